"""How a program ends: a line for each mistake of the user, a traceback for a defect."""

from pathlib import Path

import pytest

from pipeline.errors import Problem, RunStopped, UserError, as_typed, exit_on_user_error
from pipeline.runner.records import recorded_values
from pipeline.runner.steps import Step


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            UserError(Problem("seed", -1, "raise it"), Problem("optim", "x", "omit it")),
            2,
            "seed: -1: raise it\noptim: x: omit it\n",
        ),
        (RunStopped("The disk is full.", exit_code=3), 3, "The disk is full.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
)
def test_an_end_for_a_known_reason_is_a_message_and_an_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == said


def test_commands_in_messages_are_called_as_the_user_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/a/.venv/bin/fourstage", "run"])
    monkeypatch.delenv("FOURSTAGE_COMMAND", raising=False)
    monkeypatch.delenv("FOURSTAGE_VENV", raising=False)
    assert as_typed("chat", "runs/a b") == "fourstage chat 'runs/a b'"
    monkeypatch.setenv("FOURSTAGE_COMMAND", "./fourstage")
    assert as_typed("chat", "runs/a b") == "./fourstage chat 'runs/a b'"
    monkeypatch.setenv("FOURSTAGE_VENV", "my venv")
    assert as_typed("chat", "runs/a b") == "FOURSTAGE_VENV='my venv' ./fourstage chat 'runs/a b'"


def test_a_message_sends_no_codes_to_the_terminal() -> None:
    problem = Problem("a\x9b2J", "\x1b]0;title\x07\x1b[2J\n\u202eé 日本 🙂\ud800", "omit\x00 it")
    assert str(problem) == r"a\x9b2J: \x1b]0;title\x07\x1b[2J \u202eé 日本 🙂\ud800: omit\x00 it"


def test_any_other_error_keeps_its_traceback_whatever_it_says() -> None:
    with pytest.raises(ValueError, match="optim"), exit_on_user_error():
        raise ValueError("optim is wrong")


def test_no_message_contains_a_token_and_no_record_the_environment() -> None:
    error = UserError(Problem("hub_tokn", "hf_abcdefgh123", "unknown field"))
    assert "abcdefgh" not in str(error) and "hf_***" in str(error)
    values = {"seed": 1, "hub_token": "hf_abcdefgh123", "env": {"WANDB_API_KEY": "secret"}}
    assert recorded_values(Step("2_sft", "sft", (), Path(), values=values)) == {"seed": 1, "env": ["WANDB_API_KEY"]}
