"""`fourstage copy RECIPE FOLDER`: copy a recipe of the package into your own folder.

The copy writes to runs/<name of the folder>, and includes the recipe's README and the launch file.
"""

import argparse
import re
from pathlib import Path

from pipeline.config.recipe_folder import LAUNCH_FILE, SHIPPED
from pipeline.errors import Problem, refuse
from pipeline.files import check_new_directory, write_text
from pipeline.runner.plan import read_plan

README = "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="one of the recipes below")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write to, which must be new or empty")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines: list[str] = []
    for name in shipped_recipes():
        with (SHIPPED / name / README).open(encoding="utf-8") as file:
            title = file.readline().strip("# ").rstrip()
        lines.append(f"  {name:<21} {title}")
    parser.epilog = "\n".join(lines)


def shipped_recipes() -> list[str]:
    """Return the names of the recipe folders that come with the package, such as "existing-model/full"."""
    return sorted({path.parent.relative_to(SHIPPED).as_posix() for path in SHIPPED.glob("**/[0-9]_*.yaml")})


def main(args: argparse.Namespace) -> int:
    """Write the files of a recipe to a folder, which must be new or empty. Return 0."""
    problems: list[Problem | None] = []
    name = args.recipe.removeprefix(f"{SHIPPED.name}/").rstrip("/")
    if name not in shipped_recipes():
        remedy = f"is not a recipe of the package; choose from: {', '.join(shipped_recipes())}"
        problems.append(Problem("RECIPE", args.recipe, remedy))
    problems.append(check_new_directory(args.folder, "FOLDER"))
    refuse(*problems)
    run_dir = f"runs/{args.folder.resolve().name}"
    new_paths = _new_paths(name, args.folder, run_dir)
    files: list[Path] = []
    for pattern in ("*.yaml", "*.jsonl", README):
        files += sorted((SHIPPED / name).glob(pattern))
    files.append(SHIPPED / "accelerate" / LAUNCH_FILE)
    for file in files:
        text = file.read_text(encoding="utf-8")
        for expression, new_path in new_paths.items():
            # In a replacement, a backslash would begin a reference to a group.
            text = re.sub(expression, new_path.replace("\\", r"\\"), text)
        write_text(args.folder / file.name, text)
    print(f"{args.folder}: a copy of {name}, which writes to {run_dir}; fourstage run {args.folder}")
    return 0


def _new_paths(name: str, folder: Path, run_dir: str) -> dict[str, str]:
    """Return the path in the copy of a recipe for each path in its files, which is matched by a regular expression.

    The text is edited rather than the values, to keep comments and order. A copy of `pocket` to the folder `mine` has:

        runs/pocket               runs/mine                       but not in runs/pocket-people
        recipes/pocket            mine                            but not in recipes/pocket-people
        accelerate_config.yaml    mine/accelerate_config.yaml     but not in other/accelerate_config.yaml

    Args:
        name: Name of the recipe, such as "existing-model".
        folder: Folder of the copy.
        run_dir: Directory that the copy writes to.
    """
    # `recipes/existing-model/full` is a recipe of its own, and not a file of `recipes/existing-model`.
    inner_recipes = [recipe.removeprefix(name) for recipe in shipped_recipes() if recipe.startswith(f"{name}/")]
    longer_names = "|".join([*inner_recipes, "[-0-9A-Za-z_]"])
    shipped_run_dir = re.escape(read_plan(SHIPPED / name).run_dir.as_posix())
    return {
        rf"\b{shipped_run_dir}(?![\w-])": run_dir,
        rf"\brecipes/{name}(?!{longer_names})": folder.as_posix(),
        rf"(?<![\w/]){re.escape(LAUNCH_FILE)}": (folder / LAUNCH_FILE).as_posix(),
    }
