"""`python -m pipeline compare`, on runs whose differences are known."""

import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.__main__ import main
from pipeline.evaluation.intervals import outcome_mean
from pipeline.evaluation.metric_info import metric_info
from pipeline.report.differences import compare, pair_by_seed
from pipeline.report.load import load_runs
from tests.helpers.fake_run import write_run
from tests.helpers.files import write_rows

ROWS = 200


def make_run(path: Path, seed: int | None, outcomes: Iterable[float], stage: str = "2_sft") -> Path:
    """Write a run with one figure, `pass@1` of `stage`."""
    (path / "evaluations").mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps({"seed": seed, "steps": {}}))
    values = [float(value) for value in outcomes]
    lines = [{"metric": "pass@1", "id": i, "kind": "ab"[i % 2], "value": value} for i, value in enumerate(values)]
    write_rows(path / "evaluations" / f"{stage}.jsonl", lines)
    metrics = {"pass@1": outcome_mean(values).to_json()}
    (path / "evaluations" / f"{stage}.json").write_text(json.dumps({"metrics": metrics}))
    return path


def coins(seed: int, share: float = 0.5) -> list[float]:
    rng = random.Random(seed)
    return [float(rng.random() < share) for _ in range(ROWS)]


def shifted(values: list[float], share: float) -> list[float]:
    """Turn so many of the wrong answers right that the share of right ones rises by `share`."""
    wrong = [i for i, value in enumerate(values) if not value][: round(share * len(values))]
    return [1.0 if i in wrong else value for i, value in enumerate(values)]


Compare = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run_compare(capsys: pytest.CaptureFixture[str]) -> Compare:
    """Run the command; returns its exit code, the JSON on stdout ({} if there is none) and stderr."""

    def run(*argv: object) -> tuple[int, dict[str, Any], str]:
        try:
            code = main(["compare", *map(str, argv)])
        except SystemExit as stop:
            code = int(str(stop.code))
        out, err = capsys.readouterr()
        return code, json.loads(out) if out.startswith("{") else {}, err

    return run


def change(a: list[Path], b: list[Path]) -> Any:
    """Return the estimate of the difference of the runs of `make_run`."""
    pairs, problems = pair_by_seed(load_runs(a), load_runs(b))
    assert not problems
    return compare(pairs)["2_sft"]["pass@1"]


def test_a_shift_is_found(tmp_path: Path, run_compare: Compare) -> None:
    for seed in range(3):
        outcomes = coins(seed)
        make_run(tmp_path / "b" / f"seed{seed}", seed, outcomes)
        make_run(tmp_path / "a" / f"seed{seed}", seed, shifted(outcomes, 0.2))
    code, differences, err = run_compare(tmp_path / "a", "--against", tmp_path / "b")
    assert code == 0
    entry = differences["2_sft"]["pass@1"]
    assert set(entry) == {"value", "ci95", "n"} and entry["n"] == 3
    assert entry["value"] == pytest.approx(0.2)
    # The shift is the same for each seed, so the interval is that over the rows.
    assert entry["ci95"] == pytest.approx(
        [0.2 - 1.96 * (0.16 / ROWS) ** 0.5, 0.2 + 1.96 * (0.16 / ROWS) ** 0.5], abs=0.01
    )
    assert "+0.200" in err and "better" in err
    _, differences, err = run_compare(tmp_path / "b", "--against", tmp_path / "a")
    assert differences["2_sft"]["pass@1"]["value"] == pytest.approx(-0.2)
    assert "−0.200" in err and "worse" in err


def test_a_run_against_itself_has_no_difference(whole_run: Path, run_compare: Compare) -> None:
    code, differences, err = run_compare(whole_run, "--against", whole_run)
    assert code == 0
    assert set(differences) >= {"0_random", "1_pretrain", "2_sft", "3_reward", "3_ppo", "4_grpo"}
    for stage, metrics in differences.items():
        for metric, entry in metrics.items():
            low, high = entry["ci95"]
            assert entry["value"] == 0 and low <= 0 <= high
            # Sixty equal answers do not show that the next one is equal as well.
            width = pytest.approx(3.92 * 2**0.5 / 62, abs=1e-4) if metric_info(metric).share else 0
            assert stage == "3_reward" or high - low == width, "paired by row"
    assert "better" not in err.replace("better or worse by chance", "")


def test_one_seed_has_the_paired_interval_over_rows(tmp_path: Path) -> None:
    outcomes = coins(0)
    a = make_run(tmp_path / "a", 0, shifted(outcomes, 0.1))
    b = make_run(tmp_path / "b", 0, outcomes)
    difference = change([a], [b])
    assert difference.value == pytest.approx(0.1) and difference.n == ROWS
    # A tenth of the rows differ by 1 and the others by 0: a variance of 0.1 * 0.9.
    half_width = 1.96 * (0.09 / ROWS) ** 0.5
    assert (difference.low, difference.high) == pytest.approx((0.1 - half_width, 0.1 + half_width), abs=0.01)


def test_seeds_that_differ_widen_the_interval(tmp_path: Path) -> None:
    outcomes = coins(0)
    pairs = [
        (
            make_run(tmp_path / f"a{seed}", seed, shifted(outcomes, gain)),
            make_run(tmp_path / f"b{seed}", seed, outcomes),
        )
        for seed, gain in enumerate((0.0, 0.2, 0.1))
    ]
    difference = change([a for a, _ in pairs], [b for _, b in reversed(pairs)])
    half = 4.3027 * 0.1 / 3**0.5
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1 - half, 0.1 + half), abs=1e-4)


def test_the_intervals_of_twenty_comparisons_are_wider(tmp_path: Path, run_compare: Compare) -> None:
    outcomes = coins(0)
    a = make_run(tmp_path / "a", 0, shifted(outcomes, 0.04))
    b = make_run(tmp_path / "b", 0, outcomes)
    _, alone, err = run_compare(a, "--against", b)
    assert "better" in err.replace("better or worse by chance", "") and "95% interval" in err
    _, of_twenty, err = run_compare(a, "--against", b, "--tests", 20)
    assert "better" not in err and "99.75% interval" in err
    assert "one or more of 20 such intervals would miss 0 in 5% of cases" in err
    alone, of_twenty = alone["2_sft"]["pass@1"], of_twenty["2_sft"]["pass@1"]
    assert alone["value"] == of_twenty["value"] and of_twenty["tests"] == 20
    assert of_twenty["ci95"][0] < 0 < alone["ci95"][0]


def test_without_a_difference_the_interval_contains_0(tmp_path: Path) -> None:
    """The model answers each row right with the same probability under both recipes; seeds vary in both."""
    rng = np.random.default_rng(0)
    contained = 0
    for trial in range(60):
        chance = rng.beta(1, 1, ROWS)
        runs: dict[str, list[Path]] = {"a": [], "b": []}
        for side, made in runs.items():
            for seed in range(3):
                of_seed = np.clip(chance + rng.normal(0, 0.03), 0, 1)
                made.append(make_run(tmp_path / f"{trial}{side}{seed}", seed, rng.random(ROWS) < of_seed))
        difference = change(runs["a"], runs["b"])
        contained += difference.low <= 0 <= difference.high
    assert contained >= 55


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0, 0.4))
def test_swapping_the_sides_turns_the_sign(tmp_path: Path, seed: int, seeds: int, gain: float) -> None:
    a = [make_run(tmp_path / f"a{i}", i, shifted(coins(seed + i), gain)) for i in range(seeds)]
    b = [make_run(tmp_path / f"b{i}", i, coins(seed + i + 10)) for i in range(seeds)]
    there, back = change(a, b), change(b, a)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=0.01)
    assert -1 <= there.low <= there.value <= there.high <= 1
    means = [
        np.mean([shifted(coins(seed + i), gain) for i in range(seeds)]),
        np.mean([coins(seed + i + 10) for i in range(seeds)]),
    ]
    assert there.value == pytest.approx(means[0] - means[1])


def test_all_that_does_not_fit_is_refused_at_once_and_nothing_written(tmp_path: Path, run_compare: Compare) -> None:
    a = [make_run(tmp_path / "a" / f"seed{seed}", seed, coins(seed)) for seed in (0, 1, 2)]
    b = [make_run(tmp_path / "b" / f"seed{seed}", seed, coins(seed)) for seed in (1, 2, 3)]
    twin = make_run(tmp_path / "twin", 0, coins(0))
    make_run(b[0], 1, coins(1)[:-1])
    make_run(b[1], 2, [*coins(2), 1.0])
    files = sorted(tmp_path.rglob("*"))
    code, _, err = run_compare(*a, twin, "--against", tmp_path / "b", "--output", tmp_path / "a")
    assert code == 2
    assert [line.split(";")[0] for line in err.splitlines()] == [
        f"--output: {tmp_path / 'a'}: is a directory",
        f"A: {twin}: has seed 0, like {a[0]}",
        f"A: {twin}: has seed 0, but no run on the other side does",
        f"--against: {b[2]}: has seed 3, but no run on the other side does",
        f"--against: {b[0]}: was measured on different test rows than {a[1]} (pass@1 of 2_sft)",
        f"--against: {b[1]}: was measured on different test rows than {a[2]} (pass@1 of 2_sft)",
    ]
    assert sorted(tmp_path.rglob("*")) == files


def test_rows_with_the_same_number_and_another_content_are_other_rows(tmp_path: Path, run_compare: Compare) -> None:
    for side, offset in (("a", 1), ("b", 2)):
        run = make_run(tmp_path / side, 0, coins(0))
        file = run / "evaluations" / "2_sft.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        write_rows(file, [{**line, "row": f"{line['id'] * offset:x}"} for line in lines])
    code, _, err = run_compare(tmp_path / "a", "--against", tmp_path / "b")
    assert code == 2 and "was measured on different test rows" in err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["RUN"], "the following arguments are required: --against"),
        (["RUN", "--against", "missing"], "RUN: missing: no such directory"),
        (["RUN", "--against", "OTHER"], "--against: OTHER: has no metric in common with RUN"),
        (["RUN", "--against", "RUN", "--tests", "0"], "--tests: 0: is not a number of comparisons; give 1 or more"),
        (["RUN", "--against", "RUN", "--output", "RUN"], "--output: RUN: is a directory"),
        (["RUN", "--against", "RUN", "--output", "RUN/run.json/x"], "--output: RUN/run.json: is not a directory"),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_compare: Compare, argv: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("RUN"), 0, coins(0))
    make_run(Path("OTHER"), 0, coins(0), stage="4_grpo")
    code, differences, err = run_compare(*argv)
    assert code == 2 and not differences
    assert expected in err and err.count("\n") == 1


def test_the_json_goes_to_a_file_and_the_table_to_stdout(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", seed=0, examples=60)
    output = tmp_path / "new" / "difference.json"
    assert main(["compare", str(whole_run), "--against", str(other), "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(output.read_text())["4_grpo"]) >= {"pass@1", "win_rate", "bits_per_byte"}
    assert "Instruction accuracy" in out and not err


def test_figures_that_a_run_lacks_are_named(whole_run: Path, tmp_path: Path, run_compare: Compare) -> None:
    partial = shutil.copytree(whole_run, tmp_path / "partial")
    (partial / "evaluations" / "4_grpo.json").unlink()
    code, differences, err = run_compare(whole_run, "--against", partial)
    assert code == 0 and "4_grpo" not in differences and "3_ppo" in differences
    assert "Omitted, because not every run has them: bits_per_byte of 4_grpo" in err


def test_stages_of_one_run_are_compared_with_each_other(tmp_path: Path, run_compare: Compare) -> None:
    """`compare` takes the folders of two variants of a stage."""
    outcomes = coins(0)
    for seed in (0, 1):
        run = tmp_path / f"seed{seed}"
        make_run(run, seed, shifted(outcomes, 0.1 + 0.1 * seed), stage="4_dapo")
        make_run(run, seed, outcomes, stage="4_grpo")
    first, second = run / "4_dapo", run / "4_grpo"
    code, differences, err = run_compare(first, second)
    assert code == 0 and list(differences) == ["4_dapo"]
    assert differences["4_dapo"]["pass@1"]["value"] == pytest.approx(0.2)
    assert f"A: {first}" in err and f"B: {second}" in err and "Omitted" not in err
    _, turned, _ = run_compare(second, "--against", first)
    assert turned["4_grpo"]["pass@1"]["value"] == pytest.approx(-0.2)
    sides = [[tmp_path / f"seed{seed}" / stage for seed in (0, 1)] for stage in ("4_dapo", "4_grpo")]
    _, over_seeds, _ = run_compare(*sides[0], "--against", *sides[1])
    assert over_seeds["4_dapo"]["pass@1"]["value"] == pytest.approx(0.15)


@pytest.mark.parametrize("names", [["4_dapo"], ["4_dapo", "4_grpo", "4_dapo"], ["4_dapo", ""], ["4_dapo", "4_missing"]])
def test_anything_but_two_measured_stages_needs_an_opponent(
    tmp_path: Path, run_compare: Compare, names: list[str]
) -> None:
    for stage in ("4_dapo", "4_grpo"):
        make_run(tmp_path / "run", 0, coins(0), stage=stage)
    code, differences, err = run_compare(*(tmp_path / "run" / name for name in names))
    assert code == 2 and not differences and "the following arguments are required: --against" in err
    assert err.count("\n") == 1


def test_reward_models_are_compared_on_pairs_of_their_own(tmp_path: Path, run_compare: Compare) -> None:
    """Each run samples its own pairs of answers, whose number and kinds differ."""
    a, b = write_run(tmp_path / "a", examples=60), write_run(tmp_path / "b", examples=60)
    file = b / "evaluations" / "3_reward.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-5]))
    code, differences, _ = run_compare(a, "--against", b)
    assert code == 0
    low, high = differences["3_reward"]["reward_margin"]["ci95"]
    assert (low, high) == pytest.approx((-0.2 * 2**0.5, 0.2 * 2**0.5))


def test_runs_that_were_measured_in_another_way_are_named(tmp_path: Path, run_compare: Compare) -> None:
    sides = [make_run(tmp_path / name, 0, coins(1)) for name in "ab"]
    for side, length in zip(sides, (64, 16), strict=True):
        path = side / "evaluations" / "2_sft.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "settings": {"max_new_tokens": length, "samples": 8}})
        )
    code, _, err = run_compare(sides[0], "--against", sides[1])
    assert code == 0 and f"{sides[1]}: 2_sft measured with a different max_new_tokens than {sides[0]}" in err
