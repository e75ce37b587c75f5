"""The list of the runs that students hand in."""

import json
import random
from pathlib import Path

import pytest

from lessons.ranking import main, rank
from pipeline.errors import UserError
from pipeline.evaluation.intervals import outcome_mean
from tests.helpers.files import write_rows

ROWS = 200


def hand_in(path: Path, outcomes: list[float], seed: int = 0) -> Path:
    """Write what a student hands in: `run.json`, and an evaluation with one metric."""
    (path / "evaluations").mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"seed": seed, "steps": {}}))
    rows = [{"metric": "pass@1", "id": i, "kind": "", "value": value} for i, value in enumerate(outcomes)]
    write_rows(path / "evaluations" / "4_grpo.jsonl", rows)
    metrics = {"pass@1": outcome_mean(outcomes).to_json()}
    (path / "evaluations" / "4_grpo.json").write_text(json.dumps({"metrics": metrics}))
    return path


@pytest.fixture
def outcomes() -> list[float]:
    rng = random.Random(0)
    return [float(rng.random() < 0.5) for _ in range(ROWS)]


def more_right(outcomes: list[float], share: float) -> list[float]:
    wrong = [i for i, outcome in enumerate(outcomes) if not outcome][: round(share * ROWS)]
    return [1.0 if i in wrong else outcome for i, outcome in enumerate(outcomes)]


def test_a_small_gain_is_first_but_not_called_better_among_twenty(tmp_path: Path, outcomes: list[float]) -> None:
    teacher = hand_in(tmp_path / "teacher", outcomes)
    ann = hand_in(tmp_path / "ann", more_right(outcomes, 0.04))
    (alone,) = rank([ann], teacher, "4_grpo", "pass@1")
    assert alone.verdict == "better"
    others = [hand_in(tmp_path / f"student{i}", outcomes) for i in range(19)]
    places = rank([*others, ann], teacher, "4_grpo", "pass@1")
    assert places[0].name == str(ann) and {place.verdict for place in places} == {"same"}


def test_several_seeds_are_compared_with_those_of_the_teacher(tmp_path: Path, outcomes: list[float]) -> None:
    for seed in (1, 2):
        hand_in(tmp_path / "teacher" / f"seed{seed}", outcomes, seed)
        hand_in(tmp_path / "ann" / f"seed{seed}", more_right(outcomes, 0.1 * seed), seed)
    (place,) = rank([tmp_path / "ann"], tmp_path / "teacher", "4_grpo", "pass@1")
    assert place.change is not None and place.change.value == pytest.approx(0.15) and place.change.n == 2


def test_what_cannot_be_compared_is_last_with_the_reason(
    tmp_path: Path, outcomes: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hand_in(Path("teacher"), outcomes)
    hand_in(Path("ann"), more_right(outcomes, 0.3))
    hand_in(Path("bob"), outcomes, seed=1)
    hand_in(Path("eve"), outcomes[:-1])
    hand_in(Path("zoe"), more_right(outcomes, 0.1))
    main(["bob", "eve", "missing", "zoe", "ann", "--against", "teacher"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "pass@1 of 4_grpo, minus the teacher's; 99% intervals, which hold together with 95%"
    assert [line.split()[:3] for line in lines[:2]] == [["1", "ann", "+0.300"], ["2", "zoe", "+0.100"]]
    assert all(line.endswith("better") for line in lines[:2])
    reasons = ("has seed 1", "was measured on different test rows", "no such directory")
    for line, name, reason in zip(lines[2:], ("bob", "eve", "missing"), reasons, strict=True):
        assert line.split()[:4] == ["–", name, "not", "compared:"] and reason in line


def test_a_teacher_without_a_run_is_an_error(tmp_path: Path, outcomes: list[float]) -> None:
    with pytest.raises(UserError, match="no such directory"):
        rank([hand_in(tmp_path / "ann", outcomes)], tmp_path / "missing", "4_grpo", "pass@1")
