"""The rule of the contest between two versions: the same version is refused, a faster one accepted."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.report.targets import Target
from tests.benchmarks import contest
from tests.benchmarks.contest import LOOKS, broken_promises, hold, judge, simulate

SHARE = np.array([0.5, 0.15, 0.1, 0.15, 0.1])
NOISE = 0.02
TARGETS = [Target("4_grpo", "pass@1", at_least=0.5)]


def halves(runs: int = 12) -> np.ndarray:
    """The noise of recorded runs: 2% in each step, and a burst of other work in every tenth."""
    random = np.random.default_rng(0)
    return NOISE * random.standard_normal((runs, 5)) + 0.5 * (random.random((runs, 5)) < 0.1)


def test_the_same_version_is_refused_and_three_percent_are_accepted() -> None:
    kept = np.ones((12, 2))
    won, _ = simulate(halves(), SHARE, kept, gain=0.0, contests=100)
    # With 1%, more than 4 of 100 are won in one case of 290.
    assert won <= 4 / 100
    won, early = simulate(halves(), SHARE, kept, gain=0.03, contests=40)
    assert won >= 0.8
    assert simulate(halves(), SHARE, kept, gain=0.10, contests=20)[1] > early
    assert simulate(halves(), SHARE, kept, gain=-0.03, contests=20)[0] == 0


def test_a_gain_is_measured_with_its_interval_and_noise_is_named() -> None:
    random = np.random.default_rng(0)
    record = 400 * SHARE * np.exp(NOISE * random.standard_normal((16, 5)))
    contender = 360 * SHARE * np.exp(NOISE * random.standard_normal((16, 5)))
    verdict = judge(record, contender)
    assert verdict.faster and verdict.low < 0.1 < verdict.high and verdict.gain == pytest.approx(0.1, abs=0.01)
    assert 0.005 < verdict.visible < 0.03
    # The first look leaves a small gain open, the second one decides.
    assert judge(record[:12], record[:12] * 1.001).faster is None
    assert judge(record, record * 1.001).faster is False
    # Other work on the machine in one step of some runs counts little.
    contender[:3, 0] *= 3
    assert judge(record, contender).faster


def test_promises_are_kept_by_the_mean_and_not_broken_more_often() -> None:
    record = np.full((16, 3), 0.1)
    contender = record.copy()
    contender[:4, 0] = -0.1
    contender[:5, 1] = -0.1
    contender[:2, 2] = -1.0
    # Four seeds of 16 may be chance, five are not; the third promise is broken by its mean.
    assert broken_promises(record, contender).tolist() == [False, True, True]
    assert broken_promises(contender, contender).tolist() == [False, False, True]
    # A figure that was not measured.
    assert broken_promises(record, np.full((16, 3), -np.inf)).all()


def write_side(folder: Path, speed: float, right: float, seeds: int = min(LOOKS), noise: int = 0) -> Path:
    """Write runs of one version, each with two steps and one figure."""
    random = np.random.default_rng(noise)
    for seed in range(seeds):
        run = folder / f"seed{seed}"
        (run / "evaluations").mkdir(parents=True)
        values = [float(i < right * 100) for i in range(100)]
        rows = [{"metric": "pass@1", "id": i, "value": value} for i, value in enumerate(values)]
        (run / "evaluations" / "4_grpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        figure = {"value": right, "ci95": [right - 0.1, right + 0.1], "n": 100}
        (run / "evaluations" / "4_grpo.json").write_text(json.dumps({"metrics": {"pass@1": figure}}))
        steps = {name: {"seconds": speed * (1 + NOISE * random.standard_normal())} for name in ("2_sft", "4_grpo")}
        (run / "run.json").write_text(json.dumps({"seed": seed, "steps": steps}))
    return folder


def test_folders_of_runs_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contest, "load_targets", lambda: TARGETS)
    record = write_side(tmp_path / "record", 100, 0.9)
    assert hold(record, write_side(tmp_path / "fast", 80, 0.9, noise=1))
    assert "THE CONTENDER WINS" in capsys.readouterr().out
    assert not hold(record, write_side(tmp_path / "same", 100, 0.9, noise=2))
    assert "go on to 16 seeds" in capsys.readouterr().out
    assert not hold(record, write_side(tmp_path / "worse", 80, 0.4, noise=3))
    assert "10 (record 0)  <- broken" in capsys.readouterr().out
    # With fewer seeds, or without a partner, there is no contest.
    monkeypatch.setattr("sys.argv", ["contest", "--record", str(record), "--contender", str(record / "seed0")])
    with pytest.raises(SystemExit, match="no run on the other side does"):
        contest.main()
