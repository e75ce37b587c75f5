"""Code that a setting names: which of it may run, where it is found, and from which files it comes.

    reward_funcs: [my_rewards:short]        the function `short` of my_rewards.py, or of an installed package

To load `package.module:name` is to run code. What is trusted depends on who wrote the name:

    in our own tables, such as REWARDS and TOOLS                       always
    in a recipe that the user starts, or on the command line           always
    in a file of a run (arguments.json, run.json), which may have      only with `--trust NAME`: `only_trusted`
    come with a download

A name is looked up among installed modules first, and then in the working directory. That directory is not in
`sys.path`: libraries try to import modules that need not exist, such as `numexpr`, and a file of that name in a
downloaded folder would run. Only what the user named, and what that imports in turn, is looked up there.
"""

import ast
import contextlib
import difflib
import importlib
import inspect
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from importlib.util import resolve_name as resolve_relative
from pathlib import Path
from pkgutil import resolve_name
from textwrap import shorten
from types import ModuleType
from typing import Any

from pipeline.errors import Problem, RunStopped, UserError

MOVED = {"pipeline.rewards.functions:hidden_taste": "recipes.worlds.pocket.annotators:hidden_taste"}
"""Built-in functions that have moved: the former path, which YAML files and runs may still name -> the present one."""

_trusted: frozenset[str] | None = None
"""The user's code that files of a run may name; None while all names come from the user."""


@contextlib.contextmanager
def only_trusted(names: Collection[str]) -> Iterator[None]:
    """Within this context, load no function, class or task file that a user wrote, except for `names`.

    The names in our own tables are always loaded. All threads are affected.
    """
    global _trusted
    previous = _trusted
    _trusted = frozenset(names)
    try:
        yield
    finally:
        _trusted = previous


def check_trust(name: str, field: str) -> None:
    """Raise a `UserError` within `only_trusted` if `name` is not among its names.

    Args:
        name: A function `package.module:function`, or the path of a file, that a file of a run names.
        field: The field that has the name, for the message.
    """
    if _trusted is not None and name not in _trusted:
        remedy = "is named by a file of this folder, not by you; to use it, add"
        raise UserError(Problem(field, name, f"{remedy} --trust {shlex.quote(name)}"))


def find_named(name: str, field: str, table: Mapping[str, str]) -> Callable[..., Any]:
    """Import the function or class that a name refers to.

    Args:
        name: A key of `table`, or `package.module:name`.
        field: The field that has the name, for error messages.
        table: Our own functions or classes: short name -> `package.module:name`. They are always trusted.

    Raises:
        UserError: If nothing has this name, its module cannot be imported, or `check_trust` rejects it.
    """
    if name in table:
        return resolve_name(table[name])
    if ":" not in name:
        nearest = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "is not known."
        remedy = f"{hint} Known: {', '.join(table)}; or write package.module:name"
        raise UserError(Problem(field, name, remedy))

    check_trust(name, field)
    module_name, _, key = MOVED.get(name, name).rpartition(":")
    _search_working_directory(module_name)
    try:
        module = importlib.import_module(module_name)
    # A user's module may raise anything.
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(Problem(field, name, f"cannot import {module_name} ({reason})")) from error
    members = {member: value for member, value in vars(module).items() if callable(value)}
    if key in members:
        return members[key]
    remedy = f"{module_name} does not have a function {key}"
    nearest = difflib.get_close_matches(key, members, n=1)
    if nearest:
        remedy = f"{remedy}; did you mean {module_name}:{nearest[0]}?"
    raise UserError(Problem(field, name, remedy))


class _WorkingDirectoryFinder(MetaPathFinder):
    """Finds modules of a directory if the user named them, or if a module that was found in this way imports them.

    Python asks it last, after all modules that are installed or in `sys.path`. Modules inside packages are found by
    the path of their package.

    Attributes:
        directory: The working directory when the first module was named.
        named: Top-level modules that the user named. They may turn out to be installed.
        found: Top-level modules that were found in the directory.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.named: set[str] = set()
        self.found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or (fullname not in self.named and _importer() not in self.found):
            return None
        spec = PathFinder.find_spec(fullname, [self.directory])
        if spec is not None:
            self.found.add(fullname)
        return spec


def _importer() -> str:
    """Return the top-level module whose code is importing another module, called while a finder is asked for that."""
    frame = inspect.currentframe()
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        package = name.partition(".")[0]
        if name != __name__ and package != "importlib":
            return package
        frame = frame.f_back
    return ""


def _search_working_directory(module_name: str) -> None:
    """Let Python find a module, and what that imports, in the working directory too."""
    # The working directory may have been deleted.
    with contextlib.suppress(FileNotFoundError):
        directory = str(Path.cwd())
        finders = [finder for finder in sys.meta_path if isinstance(finder, _WorkingDirectoryFinder)]
        finder = next((finder for finder in finders if finder.directory == directory), None)
        if finder is None:
            finder = _WorkingDirectoryFinder(directory)
            sys.meta_path.append(finder)
        finder.named.add(module_name.partition(".")[0])


@contextlib.contextmanager
def user_code(name: str, field: str) -> Iterator[None]:
    """Turn an error in a user's function, class or method into a `UserError` that names the function and the line.

    Args:
        name: The name of the function or class, as the user wrote it.
        field: The field that has the name.
    """
    try:
        yield
    except (UserError, RunStopped):
        raise
    except (Exception, SystemExit) as error:
        package = Path(__file__).parents[1]
        frames = traceback.extract_tb(error.__traceback__)
        frames_outside = [frame for frame in frames if package not in Path(frame.filename).parents]
        place = ""
        if frames_outside:
            # The first frame outside of this package is in the user's file. Name the last line in that file, rather
            # than a line of a library that it called.
            file = frames_outside[0].filename
            lines = [frame.lineno for frame in frames_outside if frame.filename == file]
            place = f" ({file}:{lines[-1]})"
        raised = f"raised {type(error).__name__}: {shorten(str(error), 200)}{place}"
        raise UserError(Problem(field, name, f"{raised}; correct it")) from error


def code_files(text: str) -> list[Path]:
    """Return the files from which a user's function comes, or [] if `text` does not name one.

    A step that calls the function runs again when one of them changes. They are the file of its module and all that it
    imports, also within functions, except for this project and installed packages. Nothing is imported. Which files
    are imported is read from `import` statements, so that `importlib.import_module(name)` goes unnoticed.

    Args:
        text: Any setting; `package.module:function` names a function.

    Returns:
        The files, sorted. Those in the working directory are relative to it, as users write them, so that a project
        can be moved with its runs.
    """
    match = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*):\w+", text)
    if match is None:
        return []
    pending = [match[1]]
    named_package = match[1].partition(".")[0]
    files: dict[str, Path | None] = {}
    while pending:
        module = pending.pop()
        if module in files:
            continue
        files[module] = None
        package = module.partition(".")[0]
        if package != named_package and package in _installed_packages():
            continue
        file = _file_of(module)
        if file is not None:
            files[module] = file
            pending += _imported_by(file, module)
    paths = [_relative(file) for file in files.values() if file is not None]
    return sorted(set(paths))


@cache
def _installed_packages() -> frozenset[str]:
    """Return the top-level modules of all installed packages, those in development mode included."""
    return frozenset(packages_distributions())


def _file_of(module: str) -> Path | None:
    """Return the file of a user's module, or None for modules of this project, of libraries, and of Python itself."""
    first, *rest = module.split(".")
    if first in (*sys.stdlib_module_names, "__main__", "pipeline", "recipes"):
        return None
    # Looking for `package.module` would import the package.
    spec = find_spec(first) or PathFinder.find_spec(first, [str(Path.cwd())])
    if spec is None:
        return None
    candidates: list[Path] = []
    if spec.submodule_search_locations:
        # A package, in one folder or, if it has no `__init__.py`, perhaps in several.
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        if rest:
            candidates += [folder.joinpath(*rest).with_suffix(".py") for folder in folders]
        candidates += [folder.joinpath(*rest, "__init__.py") for folder in folders]
    elif not rest and spec.origin:
        candidates.append(Path(spec.origin))
    file = next(filter(Path.is_file, candidates), None)
    if file is None or "site-packages" in file.parts:
        return None
    return file.absolute()


def _imported_by(file: Path, module: str) -> list[str]:
    """Return the modules that a Python file may import, with the packages that contain them and the file itself.

    Example:
        from .deep import w, in my_package/rewards.py
            -> my_package, my_package.deep, my_package.deep.w (which may be a module, or not exist)
    """
    package = module
    if file.name != "__init__.py":
        package = module.rpartition(".")[0]
    # The step itself reports a file that is not Python.
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    names = [module]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += _names_in(node, package)
    modules: list[str] = []
    for name in names:
        parts = name.split(".")
        modules += [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return modules


def _names_in(node: ast.ImportFrom, package: str) -> list[str]:
    """Return the modules that `from NAME import ...` may import, in a module of a package, "" if it is in none."""
    base = "." * node.level + (node.module or "")
    if node.level:
        try:
            base = resolve_relative(base, package)
        except ImportError:
            # It goes beyond the outermost package, and raises an error when it is executed.
            return []
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _relative(file: Path) -> Path:
    """Return a file in the working directory relative to it, and any other one unchanged."""
    if file.is_relative_to(Path.cwd()):
        return file.relative_to(Path.cwd())
    return file
