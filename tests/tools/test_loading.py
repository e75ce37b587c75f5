"""Tools and environments by name: what is refused before anything is trained, and by which words."""

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from pipeline.errors import Problem, UserError
from pipeline.rl.arguments import GRPORewardArguments, PPORewardArguments
from pipeline.tools.loading import ToolArguments, load_environment, load_tools
from tests.helpers import small_model
from tests.helpers import tool_toy as toy

OWN = '''
def undocumented(x):
    return x

def good(x: int) -> int:
    """Return a number.

    Args:
        x: The number.
    """
    return x

async def later(x: int) -> int:
    """Return a number.

    Args:
        x: The number.
    """
    return x

class Narrow:
    def reset(self):
        """Begin."""

class Idle:
    def reset(self, **columns):
        """Begin."""

class Static(Idle):
    @staticmethod
    def move(place: str) -> str:
        """Move.

        Args:
            place: Where.
        """
        return place

class Sized(Idle):
    def __init__(self, size):
        self.size = size

class Game(Idle):
    def move(self, place: str) -> str:
        """Move.

        Args:
            place: Where.
        """
        return place

class Paid(Game):
    def get_reward(self) -> float:
        """Return the reward."""
        return 1.0
'''


def check(tools: Any, environment: str | None, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    return ToolArguments(tools=tools, environment=environment).preflight(None, tokenizer, None)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tools.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_tools", None)


@pytest.mark.usefixtures("own")
def test_tools_and_environments_are_found_by_name() -> None:
    assert [tool.__name__ for tool in load_tools(["calculator", "own_tools:good"])] == ["calculator", "good"]
    game: Any = load_environment("own_tools:Game")
    assert game.__name__ == "Game" and load_environment(None) is None and load_tools(None) == []


@pytest.mark.parametrize(
    ("tools", "environment", "said"),
    [
        (["calculater"], None, "tools: calculater: did you mean calculator?"),
        (["own_tools:undocumented"], None, "give it type hints and a docstring"),
        (["own_tools:later"], None, "is asynchronous; write a plain function"),
        (["own_tools:absent"], None, "does not have a function absent"),
        (["nowhere:f"], None, "cannot import nowhere"),
        (None, "guess_letters", "environment: guess_letters: did you mean guess_letter?"),
        (None, "own_tools:good", "must be a class with a method reset"),
        (None, "own_tools:Narrow", "must be a class with a method reset(self, **columns)"),
        (None, "own_tools:Idle", "does not have a method that a model could call"),
        (None, "own_tools:Static", "does not have a method that a model could call; write one, which takes `self`"),
        (None, "own_tools:Sized", "raised TypeError: Sized.__init__() missing 1 required"),
    ],
)
@pytest.mark.usefixtures("own")
def test_what_a_model_cannot_call_is_refused(tools: Any, environment: str | None, said: str) -> None:
    (problem,) = check(tools, environment, toy.tokenizer())
    assert said in str(problem)


def without(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PreTrainedTokenizerBase:
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_a_model_that_cannot_write_calls_or_have_them_read_is_refused() -> None:
    (problem,) = check(["calculator"], None, without(toy.tokenizer(), chat_template=small_model.CHATML))
    assert "chat template does not support tool calls" in str(problem)
    (problem,) = check(None, "guess_letter", without(toy.tokenizer(), response_template=None))
    assert "environment: guess_letter" in str(problem) and "response_template" in str(problem)
    assert not check(["calculator"], "guess_letter", toy.tokenizer())


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        load_tools(["one", "two"])
    assert len(error.value.problems) == 2


@pytest.mark.usefixtures("own")
def test_an_environment_may_be_the_only_one_that_rewards() -> None:
    for kind, arguments in ((GRPORewardArguments, {"reward_funcs": []}), (PPORewardArguments, {})):
        for environment, refused in (("own_tools:Paid", 0), ("own_tools:Game", 1), (None, 1)):
            problems = kind(**arguments, environment=environment).preflight(None, toy.tokenizer(), None)
            assert len(problems) == refused, (kind, environment)
