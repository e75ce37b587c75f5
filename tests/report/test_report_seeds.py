"""The report over several runs of one recipe."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.evaluation.intervals import Estimate
from pipeline.report.seeds import spread
from tests.helpers.fake_run import UNTIL_SFT, write_run
from tests.helpers.refusals import refused


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def read_metrics(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs of stages 0 to 2, as `python -m pipeline run --seeds 0 1 10` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "pocket"
    for seed in (0, 1, 10):
        write_run(folder / f"seed{seed}", seed, UNTIL_SFT)
    return folder


def test_several_runs_give_mean_spread_and_interval(seeds: Path, tmp_path: Path) -> None:
    runs = [seeds / f"seed{seed}" for seed in (0, 1, 10)]
    assert report(*runs, "--output_dir", tmp_path) == 0
    summary = read_metrics(tmp_path)
    entry = summary["stages"]["2_sft"]["pass@1"]
    single = [read_metrics(run / "report")["stages"]["2_sft"]["pass@1"] for run in runs]
    values = [of_run["value"] for of_run in single]
    assert entry["values"] == values
    assert entry["mean"] == pytest.approx(sum(values) / 3)
    assert entry["min"] == min(values) and entry["max"] == max(values) and entry["n"] == 3
    assert entry["sd"] == pytest.approx((sum((x - entry["mean"]) ** 2 for x in values) / 2) ** 0.5)
    low, high = entry["ci95"]
    half = 4.3027 * entry["sd"] / 3**0.5
    assert entry["mean"] - low == pytest.approx(max(half, *(x["value"] - x["ci95"][0] for x in single)), abs=1e-4)
    assert high - entry["mean"] == pytest.approx(max(half, *(x["ci95"][1] - x["value"] for x in single)), abs=1e-4)
    lengths = summary["stages"]["2_sft"]["pass@1_by_length"]
    assert {length: of["n"] for length, of in lengths.items()} == {"1": 3, "2": 3, "3": 3, "4": 3}
    assert sum(of["mean"] for of in lengths.values()) / 4 == pytest.approx(entry["mean"]), "15 problems of each length"
    assert [run["seed"] for run in summary["runs"]] == [0, 1, 10]
    gain = summary["differences"]["2_sft"]["pass@1"]
    assert gain["n"] == 3 and gain["ci95"][0] > 0 and len(gain["values"]) == 3
    for name in ("index.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "seed10" in text and "95% interval" in text and f"{low:.3f} to {high:.3f}" in text


def test_shares_stay_between_0_and_1(seeds: Path, tmp_path: Path) -> None:
    report(seeds, "--output_dir", tmp_path)
    metrics = read_metrics(tmp_path)["stages"]["2_sft"]
    assert metrics["stop_rate"]["ci95"][0] > 0 and metrics["stop_rate"]["ci95"][1] == 1
    assert metrics["mean_length"]["ci95"][1] > 15


def test_a_folder_of_seeds_is_the_runs_in_it_by_seed(seeds: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(seeds, tmp_path / "pocket")
    assert report(folder) == 0
    assert [run["run"] for run in read_metrics(folder / "report")["runs"]] == ["seed0", "seed1", "seed10"]
    assert report(folder, "--seeds", 10, 0) == 0
    assert [run["run"] for run in read_metrics(folder / "report")["runs"]] == ["seed10", "seed0"]
    assert not (folder / "seed0" / "report" / "seeds").exists()


def test_a_run_beside_seeds_is_reported_as_a_run(seeds: Path, short_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(short_run, tmp_path / "pocket")
    shutil.copytree(seeds, folder, dirs_exist_ok=True)
    report(folder)
    assert read_metrics(folder / "report")["seed"] == 4


def test_one_seed_has_the_intervals_over_its_rows(seeds: Path, tmp_path: Path) -> None:
    assert report(seeds, "--seeds", 1, "--output_dir", tmp_path) == 0
    entry = read_metrics(tmp_path)["stages"]["2_sft"]["pass@1"]
    single = read_metrics(seeds / "seed1" / "report")["stages"]["2_sft"]["pass@1"]
    assert (entry["mean"], entry["ci95"], entry["n"]) == (single["value"], single["ci95"], 1)
    assert entry["sd"] is None and entry["values"] == [single["value"]]
    assert "The intervals are over the test rows of the only run" in (tmp_path / "report.md").read_text()


def test_a_seed_that_was_not_run_is_refused(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refused(capsys, "report", seeds, "--seeds", 0, 7).splitlines()
    assert line.startswith(f"RUN: {seeds / 'seed7'}: no such directory")


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize("again", ["seed0", "../pocket/seed0", "link"])
def test_a_run_that_is_named_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, again: str
) -> None:
    """It was reported as two seeds, with an interval over them."""
    folder = tmp_path / "pocket"
    run = write_run(folder / "seed0", 0, UNTIL_SFT)
    (folder / "link").symlink_to(run)
    words = [command, run, folder / again]
    if command == "compare":
        words += ["--against", write_run(tmp_path / "other", 0, UNTIL_SFT)]
    (line,) = refused(capsys, *words).splitlines()
    assert str(folder / again) in line and str(run) in line
    assert "one run for each seed" in line
    assert not list(tmp_path.rglob("report"))


def test_runs_that_stopped_at_different_stages(whole_run: Path, short_run: Path, tmp_path: Path) -> None:
    assert report(whole_run, short_run, "--output_dir", tmp_path) == 0
    entry = read_metrics(tmp_path)["stages"]["4_grpo"]["pass@1"]
    single = read_metrics(whole_run / "report")["stages"]["4_grpo"]["pass@1"]
    assert entry["n"] == 1 and entry["sd"] is None and entry["values"][1] is None
    assert entry["ci95"] == single["ci95"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| stage | metric | mean | 95% interval | standard deviation | pocket | short |" in text
    assert re.search(r"\| `4_grpo` \| Step rate \| \+1.000 \| .* \| – \| \+1.000 \| – \|", text)


def test_runs_of_the_same_name_are_called_by_their_paths(short_run: Path, tmp_path: Path) -> None:
    runs = [tmp_path / place / "pocket" for place in ("a", "b")]
    for run in runs:
        shutil.copytree(short_run, run)
    report(*runs, "--output_dir", tmp_path)
    assert [run["run"] for run in read_metrics(tmp_path)["runs"]] == [str(run) for run in runs]


def test_a_figure_without_intervals_has_students() -> None:
    figures = spread([Estimate(2.0), None, Estimate(4.0)])
    assert figures["ci95"] == pytest.approx([3 - 12.7062, 3 + 12.7062], abs=1e-3)
    assert figures["values"] == [2.0, None, 4.0] and figures["n"] == 2


def test_baselines_and_differences_to_them_are_spread_as_well(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed{seed}", seed) for seed in (0, 1)]
    assert report(*runs, "--output_dir", tmp_path / "report") == 0
    summary = read_metrics(tmp_path / "report")
    single = [read_metrics(run / "report") for run in runs]
    for name, figures in single[0]["baselines"].items():
        for metric, entry in figures.items():
            values = [of_run["baselines"][name][metric] for of_run in single]
            if isinstance(entry, str):
                assert summary["baselines"][name][metric] == values
            else:
                assert summary["baselines"][name][metric]["values"] == [value["value"] for value in values]
                assert summary["baselines"][name][metric]["ci95"][0] >= 0
    gains = [
        next(
            x
            for x in of_run["differences"]
            if (x["stage"], x["before"], x["metric"]) == ("4_grpo", reference, "pass@1")
        )
        for reference in ("3_ppo", "elicited")
        for of_run in single
    ]
    values = [gain["value"] for gain in gains]
    assert summary["differences"]["4_grpo"]["pass@1"]["values"] == values[:2]
    assert summary["differences"]["4_grpo - elicited"]["pass@1"]["values"] == values[2:]
    assert "4_grpo - elicited" in (tmp_path / "report" / "report.md").read_text()
