"""The contest between two versions: they run in turns, the same version is refused, a faster one accepted."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.report.targets import Target
from tests.benchmarks import contest, turns
from tests.benchmarks.contest import LOOKS, broken_promises, hold, judge, signed_rank, simulate
from tests.helpers.files import write_rows

NOISE = 0.02
TARGETS = [Target("4_grpo", "pass@1", at_least=0.5)]


def test_the_same_version_is_refused_and_three_percent_are_accepted() -> None:
    noise, margins = NOISE * np.random.default_rng(0).standard_normal(12), np.ones((12, 2))
    won, _ = simulate(noise, margins, gain=0.0, contests=100)
    # With 1%, more than 4 of 100 are won in one case of 290.
    assert won <= 4 / 100
    won, early = simulate(noise, margins, gain=0.03, contests=40)
    assert won >= 0.8
    assert simulate(noise, margins, gain=0.02, contests=40)[1] < early
    assert simulate(noise, margins, gain=-0.03, contests=20)[0] == 0
    # A promise that every run breaks is not kept by the mean.
    assert simulate(noise, -margins, gain=0.10, contests=20)[0] == 0


def test_signed_ranks() -> None:
    # Of 1,024 signs, one has all ten ranks, and one all but the rank 1.
    assert signed_rank(np.arange(1, 11)) == 1 / 1024
    assert signed_rank(np.array([-1, *range(2, 11)])) == 2 / 1024
    assert signed_rank(-np.arange(1, 11)) == 1
    # Large losses in two pairs of 16, or in one of 10, hide small gains in the others; one of 16 does not.
    assert signed_rank(np.array([*range(1, 15), -15, -16])) == pytest.approx(0.029, abs=0.001)
    assert signed_rank(np.array([*range(1, 10), -10])) == pytest.approx(0.042, abs=0.001)
    assert signed_rank(np.array([*range(1, 16), -16])) < LOOKS[16]
    # As scipy.stats.wilcoxon(..., alternative="greater", method="exact") has it.
    assert signed_rank(np.array([0.3, -0.1, 0.8, -0.5, 1.2, 0.7, -0.2])) == pytest.approx(0.1484375)


def test_a_gain_is_measured_with_its_interval() -> None:
    random = np.random.default_rng(0)
    record = 400 * np.exp(NOISE * random.standard_normal(16))
    contender = 360 * np.exp(NOISE * random.standard_normal(16))
    verdict = judge(record, contender)
    assert verdict.faster and verdict.low < 0.1 < verdict.high and verdict.gain == pytest.approx(0.1, abs=0.01)
    # The first look leaves a small gain open, the second one decides.
    assert judge(record[:12], record[:12] * 1.001).faster is None
    assert judge(record, record * 1.001).faster is False
    # Something that went wrong in one run counts little.
    contender[0] *= 3
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
        write_rows(run / "evaluations" / "4_grpo.jsonl", rows)
        figure = {"value": right, "ci95": [right - 0.1, right + 0.1], "n": 100}
        (run / "evaluations" / "4_grpo.json").write_text(json.dumps({"metrics": {"pass@1": figure}}))
        taken = {name: speed * (1 + NOISE * random.standard_normal()) for name in ("2_sft", "4_grpo")}
        (run / "turns.json").write_text(json.dumps(taken))
        (run / "run.json").write_text(json.dumps({"seed": seed, "steps": {name: {} for name in taken}}))
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


def test_a_run_without_partner_is_no_contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "load_targets", lambda: TARGETS)
    record = write_side(tmp_path / "record", 100, 0.9)
    monkeypatch.setattr("sys.argv", ["contest", "--record", str(record), "--contender", str(record / "seed0")])
    with pytest.raises(SystemExit, match="no run on the other side does"):
        contest.main()


def test_runs_that_did_not_take_turns_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are contests simulated from a few pairs."""
    monkeypatch.setattr(contest, "load_targets", lambda: TARGETS)
    record = write_side(tmp_path / "record", 100, 0.9)
    write_side(tmp_path / "fast", 80, 0.9, noise=1)
    (tmp_path / "fast/seed3/turns.json").unlink()
    sides = ["contest", "--record", str(record), "--contender", str(tmp_path / "fast")]
    monkeypatch.setattr("sys.argv", [*sides, "--resample", str(record / "seed0")])
    with pytest.raises(SystemExit, match="has 9 pairs that ran in turns; at least 10 are needed"):
        contest.main()
    monkeypatch.setattr("sys.argv", sides)
    with pytest.raises(SystemExit, match="seed3: is missing; run both with tests"):
        contest.main()


VERSION = """
import json, pathlib, subprocess, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
if "child" not in sys.argv:
    run.mkdir()
    # As fourstage run does, so that Ctrl+C reaches only itself.
    sys.exit(subprocess.run([sys.executable, *sys.argv, "child"], process_group=0).returncode)
order = open(run.parents[1] / "order.txt", "a", buffering=1)
steps = {}
for step in ("1_pretrain", "2_sft"):
    for _ in range(150):
        order.write(run.parent.name + chr(10))
        time.sleep(0.002)
    steps[step] = {"finished_at": "now"}
    (run / "run.json").write_text(json.dumps({"steps": steps}))
sys.exit("--fail" in sys.argv and run.parent.name == "contender")
"""
"""Stands for a version's clone: each run says in order.txt when it is running."""


def test_versions_run_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clone = tmp_path / "clone"
    (clone / "pipeline").mkdir(parents=True)
    (clone / "pipeline/__init__.py").touch()
    (clone / "pipeline/__main__.py").write_text(VERSION)
    monkeypatch.setattr(turns, "TURN", 0.1)
    arguments = ["turns", "--record", str(clone), "--contender", str(clone), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "0", "1"])
    turns.main()
    order = (tmp_path / "runs/order.txt").read_text().split()
    assert [order.count(side) for side in ("record", "contender")] == [600, 600]
    # Two that run at the same time would change places hundreds of times.
    changes = [side for previous, side in pairwise(order) if side != previous]
    assert 2 <= len(changes) <= 100
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    for seed, line in enumerate(printed):
        # Each seed begins with the other one.
        assert line.startswith(str(tmp_path / "runs" / ("record", "contender")[seed]))
        taken = json.loads((tmp_path / f"runs/record/seed{seed}/turns.json").read_text())
        assert list(taken) == ["1_pretrain", "2_sft"] and all(value > 0 for value in taken.values())
        assert turns.seconds(tmp_path / f"runs/record/seed{seed}") == sum(taken.values())

    # Finished seeds stay; a failure ends both and is named; what it left has to be deleted.
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "0", "2", "--fail"])
    with pytest.raises(SystemExit, match=r"contender/seed2 failed with exit code 1; see .*seed2\.log"):
        turns.main()
    with pytest.raises(SystemExit, match="seed2 was interrupted: delete"):
        turns.main()
