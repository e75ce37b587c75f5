"""The architecture: packages import only from layers below their own, and no modules import each other in a circle."""

import ast
import re
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"errors", "hardware", "progress", "stages"},
    {"files", "launch"},
    {"config"},
    {"data", "models", "rewards"},
    {"hub", "tools"},
    {"preferences"},
    {"training", "evaluation"},
    {"rl", "report", "runner"},
    {"app"},
    {"__main__"},
]
"""Modules and packages at the top of `pipeline/`, lowest first. Those of one layer do not import each other."""

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("pipeline/**/*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
WORLDS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("recipes/worlds/**/*.py")}
"""The generated data, which is not in a layer; what else holds for modules holds for theirs."""
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> Iterator[str]:
    """Return every module or name that a file imports, deferred and conditional imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(name: str) -> set[str]:
    """Return the modules of the project that a module imports."""
    paths = MODULES | WORLDS
    project_modules = set()
    for imported in imports(paths[name]):
        module = imported if imported in paths else imported.rpartition(".")[0]
        if module in paths and module not in ("pipeline", name):
            project_modules.add(module)
    return project_modules


def test_every_part_of_the_package_has_a_layer() -> None:
    assert set(LAYER_OF) == {name.split(".")[1] for name in MODULES if name != "pipeline"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    own_package = name.split(".")[1] if name != "pipeline" else "__main__"
    parts = {module.split(".")[1] for module in imported_modules(name)} - {own_package}
    upwards = {part for part in parts if LAYER_OF[part] >= LAYER_OF[own_package]}
    assert not upwards, f"{name} is in layer {LAYER_OF[own_package]} and imports {', '.join(sorted(upwards))}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_library_imports_neither_recipes_nor_tests(name: str) -> None:
    assert not [module for module in imports(MODULES[name]) if module.split(".")[0] in ("recipes", "tests")]


def test_the_content_that_the_library_names_exists() -> None:
    """`"recipes.worlds.pocket.things:things"` is imported when it is used, so no import fails if it is wrong."""
    nodes = [node for path in MODULES.values() for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = {text for text in texts if re.fullmatch(r"recipes(\.\w+)+(:\w+)?", text)}
    assert "recipes.worlds.pocket.annotators:hidden_taste" in names
    for name in names:
        resolve_name(name)


def test_no_modules_import_each_other() -> None:
    paths = MODULES | WORLDS
    graph = {name: imported_modules(name) for name in paths if paths[name].name != "__init__.py"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_every_data_file_is_installed() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    patterns = {name: text.split(", ") for name, text in settings["options.package_data"].items()}
    files = [path for top in ("pipeline", "recipes") for path in (ROOT / top).rglob("*") if path.is_file()]
    for file in files:
        if file.suffix not in (".py", ".pyc"):
            package = next(folder for folder in file.parents if (folder / "__init__.py").exists())
            package_patterns = patterns.get(package.name, []) if package.parent == ROOT else []
            assert any(file in package.glob(pattern) for pattern in [*patterns["*"], *package_patterns]), file


def test_folders_and_recipes_stay_small() -> None:
    for folder in {path.parent for path in [*MODULES.values(), *WORLDS.values()]}:
        entries = [path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")]
        assert len(entries) <= (20 if folder == ROOT / "pipeline" else 16), folder
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 70, path
