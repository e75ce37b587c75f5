"""Variables are named by nouns of the field: `match` or `message`, and not `found` or `one`, which fit any value."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRONOUNS = {"found", "one", "own", "before", "asked", "given", "shown", "known", "others", "kept", "wanted"}
"""The pronouns and participles that named most variables before this test was written."""


def stored_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return the line and the name of every variable, argument, field of a class, and target of a loop or of `as`."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.MatchMapping(rest=str(name)):
                yield node.lineno, name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from ((node.lineno, alias.asname) for alias in aliases if alias.asname)


def modules() -> list[str]:
    """Return the paths of the modules from the root of the repository, such as `pipeline/rl/ppo.py`."""
    paths = [path.relative_to(ROOT) for package in ("pipeline", "recipes") for path in (ROOT / package).rglob("*.py")]
    return sorted(path.as_posix() for path in paths)


@pytest.mark.parametrize("module", modules())
def test_variables_are_not_named_by_pronouns(module: str) -> None:
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    wrong = [f"{module}:{line}: {name}" for line, name in stored_names(tree) if name in PRONOUNS]
    assert not wrong, "say what the value is: " + ", ".join(wrong)


def test_every_way_to_name_a_value_is_seen() -> None:
    code = """
import a as b
from c import d as e
def f(g, *h, i=1, **j):
    k: int = 1
    l, (m, *n) = 2, (3, 4)
    for o in [p for p in q]:
        with r() as s:
            t += (u := 1)
    try:
        lambda v: v.w
    except X as y:
        z.attribute = 5
    match a:
        case [aa, *ab] | {"key": ac, **ad} | (1 as ae):
            pass
"""
    names = sorted(name for _, name in stored_names(ast.parse(code)))
    assert " ".join(names) == "aa ab ac ad ae b e g h i j k l m n o p s t u v y"
