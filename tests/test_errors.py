"""Before the first step, an error of a library is the user's mistake if it mentions a field, and else a defect."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import Problem, UserError, begin_preparation, end_preparation, exit_on_user_error
from pipeline.runner.changes import without_secrets


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("please install GaLore", "optim: galore: please install GaLore"),
        ("the seed is odd", "seed: 3: the seed is odd"),
        ("give metric_for_best, too", "metric_for_best: not given: give metric_for_best, too"),
    ],
)
def test_an_error_that_mentions_a_field_is_reported_for_it(
    message: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs" / "output"
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        begin_preparation({"optim": "galore", "seed": 3}, ["optim", "seed", "metric_for_best"], str(output))
        output.mkdir(parents=True)
        raise ImportError(message)
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == line
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_an_error_that_mentions_no_field_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="something else is wrong"), exit_on_user_error():
        begin_preparation({"optim": "galore"}, ["optim"], None)
        raise ValueError("something else is wrong")


def test_after_the_first_step_errors_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="optim"), exit_on_user_error():
        begin_preparation({"optim": "galore"}, ["optim"], None)
        end_preparation()
        raise ValueError("optim is wrong")


def test_no_message_contains_a_token_and_no_record_the_environment() -> None:
    error = UserError(Problem("hub_tokn", "hf_abcdefgh123", "unknown field"))
    assert "abcdefgh" not in str(error) and "hf_***" in str(error)
    values = {"seed": 1, "hub_token": "hf_abcdefgh123", "env": {"WANDB_API_KEY": "secret"}}
    assert without_secrets(values) == {"seed": 1, "env": ["WANDB_API_KEY"]}
