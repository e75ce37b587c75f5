"""Which modules are found in the working directory, and from which files a function comes."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config.named_code import code_files, find_named
from pipeline.errors import UserError

FILES = {
    "my_rewards.py": """
        import json
        import my_words
        from my_package import deep

        def short(completions, **columns):
            import my_late
            return [my_late.WEIGHT for _ in completions]
        """,
    "my_words.py": "",
    "my_late.py": "from my_package.deep.weights import WEIGHT",
    "my_package/__init__.py": "",
    "my_package/deep/__init__.py": "from .weights import WEIGHT",
    "my_package/deep/weights.py": "from ..units import ONE as WEIGHT",
    "my_package/units.py": "ONE = 1",
    "my_unused.py": "",
    "my_space/rewards.py": "from my_space.others import short",
    "my_space/others.py": "def short(completions, **columns): ...",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with modules of a user, which is not in the search path."""
    for name, code in FILES.items():
        lines = [line.removeprefix(" " * 8) for line in code.splitlines()]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def find(name: str) -> Callable[..., object]:
    return find_named(name, "reward_funcs", {})


def test_a_named_function_is_found_with_what_it_imports_now_and_later() -> None:
    assert find("my_rewards:short")(completions=["a"]) == [1]
    assert find("my_space.rewards:short").__module__ == "my_space.others"


def test_modules_that_a_library_tries_are_not_found(folder: Path) -> None:
    (folder / "my_library.py").write_text("def load(name):\n    return __import__(name)\n")
    (folder / "numexpr.py").write_text("")
    find("my_rewards:short")
    for name in ("numexpr", "my_unused"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    # What a module of the user imports is found, by any kind of import.
    assert find("my_library:load")("my_unused")


def test_what_a_library_tries_is_not_found_even_if_the_user_named_a_function_of_the_library(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path_factory.mktemp("site")
    (library / "my_library.py").write_text("def load(name):\n    return __import__(name)\n")
    monkeypatch.syspath_prepend(library)
    with pytest.raises(ModuleNotFoundError):
        find("my_library:load")("my_unused")


def test_an_installed_module_comes_before_one_of_the_working_directory(folder: Path) -> None:
    (folder / "colorsys.py").write_text("def rgb_to_hls(): ...")
    assert find("colorsys:rgb_to_hls").__module__ == "colorsys"
    assert Path(sys.modules["colorsys"].__file__ or "").parent != folder


def test_another_working_directory_is_searched_in_its_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find("my_rewards:short")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "my_other.py").write_text("def act(): ...")
    monkeypatch.chdir(folder / "elsewhere")
    assert find("my_other:act")
    with pytest.raises(UserError, match="cannot import my_unknown"):
        find("my_unknown:act")


def test_the_files_of_a_function_are_its_own_and_all_that_it_imports() -> None:
    own = ["my_late.py", "my_rewards.py", "my_words.py"]
    package = ["__init__.py", "deep/__init__.py", "deep/weights.py", "units.py"]
    expected = [Path(name) for name in [*own, *(f"my_package/{name}" for name in package)]]
    assert code_files("my_rewards:short") == sorted(expected)
    assert code_files("my_space.rewards:short") == [Path("my_space/others.py"), Path("my_space/rewards.py")]
    assert not [name for name in sys.modules if name.startswith("my_")], "nothing is imported"


def test_a_function_of_a_library_or_of_this_project_has_no_files() -> None:
    for text in ("torch.hub:load", "json:loads", "pipeline.rewards.functions:choice", "a sentence: short", "x"):
        assert code_files(text) == []


def test_files_that_are_not_python_are_no_reason_to_fail(folder: Path) -> None:
    (folder / "my_words.py").write_text("def :")
    (folder / "my_late.py").write_bytes(b"\xff\x00")
    (folder / "my_package" / "deep" / "weights.py").write_text("from ......units import ONE\n" + "(" * 5000)
    assert Path("my_words.py") in code_files("my_rewards:short")
