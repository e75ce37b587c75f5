"""`fourstage copy RECIPE FOLDER`: copy a recipe of the package into your own folder.

The copy writes to runs/<name of the folder>, and includes the recipe's README and the launch file.
"""

import argparse
import re
from pathlib import Path

from pipeline.config.recipe_folder import LAUNCH_FILE, SHIPPED
from pipeline.errors import Problem, refuse
from pipeline.files import check_new_directory, write_text
from pipeline.runner.recipe import read_plan

README = "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="one of the recipes below")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write to, which must be new or empty")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    titles = {name: (SHIPPED / name / README).open(encoding="utf-8").readline() for name in shipped_recipes()}
    parser.epilog = "\n".join(f"  {name:<21} {title.strip('# ').rstrip()}" for name, title in titles.items())


def shipped_recipes() -> list[str]:
    """Return the names of the recipe folders that come with the package."""
    return sorted({path.parent.relative_to(SHIPPED).as_posix() for path in SHIPPED.glob("**/[0-9]_*.yaml")})


def main(args: argparse.Namespace) -> int:
    """Write the files of a recipe to a folder, which must be new or empty. Return 0."""
    problems: list[Problem | None] = [check_new_directory(args.folder, "FOLDER")]
    name = args.recipe.removeprefix(f"{SHIPPED.name}/").rstrip("/")
    if name not in shipped_recipes():
        remedy = f"is not a recipe of the package; choose from: {', '.join(shipped_recipes())}"
        problems.insert(0, Problem("RECIPE", args.recipe, remedy))
    refuse(*problems)
    run_dir = f"runs/{args.folder.resolve().name}"
    # The text is edited rather than the values, to keep comments and order. Only whole names match: `runs/pocket` does
    # not match `runs/pocket-people`, and `recipes/existing-model/full` is another recipe.
    others = [other.removeprefix(name) for other in shipped_recipes() if other.startswith(f"{name}/")]
    renamed = {
        rf"\b{re.escape(read_plan(SHIPPED / name).run_dir.as_posix())}(?![\w-])": run_dir,
        rf"\brecipes/{name}(?!{'|'.join([*others, '[-0-9A-Za-z_]'])})": args.folder.as_posix(),
        rf"(?<![\w/]){re.escape(LAUNCH_FILE)}": (args.folder / LAUNCH_FILE).as_posix(),
    }
    own = (path for pattern in ("*.yaml", "*.jsonl", README) for path in sorted((SHIPPED / name).glob(pattern)))
    for path in (*own, SHIPPED / "accelerate" / LAUNCH_FILE):
        text = path.read_text(encoding="utf-8")
        for pattern, new in renamed.items():
            text = re.sub(pattern, new.replace("\\", r"\\"), text)
        write_text(args.folder / path.name, text)
    print(f"{args.folder}: a copy of {name}, which writes to {run_dir}; fourstage run {args.folder}")
    return 0
