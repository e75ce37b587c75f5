"""`python -m pipeline report`: what it writes, from whole, partial, several and damaged runs."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.evaluation.metric_info import metric_info
from pipeline.report.text import number, signed
from tests.helpers.fake_run import STAGES, TEXTS, UNTIL_SFT, write_weights
from tests.helpers.refusals import refused


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def read_json(path: Path) -> dict[str, Any]:
    """Read strictly: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return content


def test_metrics_json_keeps_its_contract(whole_run: Path, tmp_path: Path) -> None:
    assert report(whole_run, "--output_dir", tmp_path) == 0
    summary = read_json(tmp_path / "metrics.json")
    assert list(summary["stages"]) == list(STAGES)
    for metrics in summary["stages"].values():
        lengths = metrics.pop("pass@1_by_length", {})
        assert list(lengths) == (["1", "2", "3", "4"] if "pass@1" in metrics else [])
        for entry in [*metrics.values(), *lengths.values()]:
            low, high = entry["ci95"]
            assert low <= entry["value"] <= high
            assert entry["n"] > 0
    assert set(summary["stages"]["2_sft"]["instruction_accuracy"]["by_kind"]) == {
        "question",
        "summary",
        "code",
    }
    assert summary["seconds"]["1_pretrain"] == pytest.approx(98.6, abs=0.6)
    assert "report" not in summary["seconds"]
    assert summary["peak_memory"]["1_pretrain"] == 5_000_000 * round(summary["seconds"]["1_pretrain"])
    assert set(summary["peak_memory"]) == set(summary["seconds"])
    assert summary["hardware"]["cores"] == 2
    assert summary["versions"]["trl"] == "1.16.0"
    assert summary["seed"] == 0
    assert summary["parameters"]["1_pretrain"] == 2048 * 192 + 6 * 262144
    assert summary["flops"]["1_pretrain"] == 6 * summary["parameters"]["1_pretrain"] * summary["tokens"]["1_pretrain"]
    evaluated = json.loads((whole_run / "evaluations" / "4_grpo.json").read_text())
    assert summary["stages"]["4_grpo"]["pass@1"]["value"] == evaluated["metrics"]["pass@1"]["value"]


def test_operations_leave_out_the_experts_that_a_token_does_not_pass(whole_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole_run, tmp_path / "run")
    shapes = {"embed": [100, 8], "layers.0.feed_forward.experts.down_proj": [4, 16, 8], "shared_expert.up": [16, 8]}
    write_weights(run / "1_pretrain" / "model.safetensors", shapes)
    config = {"model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1}
    (run / "1_pretrain" / "config.json").write_text(json.dumps(config))
    (run / "2_sft" / "model.safetensors").rename(run / "2_sft" / "adapter_model.safetensors")
    (run / "2_sft" / "config.json").unlink()
    assert report(run, "--output_dir", tmp_path) == 0
    summary = read_json(tmp_path / "metrics.json")
    assert summary["parameters"]["1_pretrain"] == 800 + 4 * 128 + 128
    assert summary["flops"]["1_pretrain"] == 6 * (800 + 128 + 128) * summary["tokens"]["1_pretrain"]
    assert summary["flops"]["2_sft"] == 1e12, "the trainer counted the base, too"


@pytest.mark.parametrize(
    "base",
    ["1_pretrain", "alice/on-the-hub", "no\0path", "x" * 5000],
    ids=["folder", "hub", "null", "long"],
)
def test_an_adapter_is_counted_with_its_base_model(whole_run: Path, tmp_path: Path, base: str) -> None:
    run = shutil.copytree(whole_run, tmp_path / "run")
    (run / "2_sft" / "model.safetensors").unlink()
    write_weights(run / "2_sft" / "adapter_model.safetensors", {"lora_A": [2, 8], "lora_B": [8, 2]})
    config = {"base_model_name_or_path": str(run / base) if base == "1_pretrain" else base}
    (run / "2_sft" / "adapter_config.json").write_text(json.dumps(config))
    assert report(run, "--output_dir", tmp_path) == 0
    parameters = read_json(tmp_path / "metrics.json")["parameters"]
    assert parameters.get("2_sft") == (parameters["1_pretrain"] + 32 if base == "1_pretrain" else None)


def test_differences_compare_each_stage_with_the_one_it_started_from(whole_run: Path, tmp_path: Path) -> None:
    report(whole_run, "--output_dir", tmp_path)
    summary = read_json(tmp_path / "metrics.json")
    pairs = {(item["stage"], item["before"]) for item in summary["differences"]}
    assert {pair for pair in pairs if pair[1] not in summary["baselines"]} == {
        ("1_pretrain", "0_random"),
        ("2_sft", "1_pretrain"),
        ("3_ppo", "2_sft"),
        ("4_grpo", "3_ppo"),
    }
    assert {start for stage, start in pairs if stage == "4_grpo"} == {"3_ppo", "elicited", "majority"}
    gain = next(x for x in summary["differences"] if (x["stage"], x["metric"]) == ("4_grpo", "pass@1"))
    stages = summary["stages"]
    assert gain["value"] == pytest.approx(stages["4_grpo"]["pass@1"]["value"] - stages["3_ppo"]["pass@1"]["value"])
    assert gain["aim"] and gain["verdict"] == "better" and gain["ci95"][0] > 0
    assert set(gain["by_kind"]) == {"arithmetic", "ordering", "counting", "logic"}
    bits = next(x for x in summary["differences"] if (x["stage"], x["metric"]) == ("2_sft", "bits_per_byte"))
    # More bits are worse.
    assert bits["verdict"] == "worse" and not bits["aim"]


def test_a_second_reward_model_is_no_stage_that_others_start_from(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    for suffix in ("json", "jsonl"):
        for name in ("3_judge", "3_reward_2"):
            shutil.copy(run / "evaluations" / f"3_reward.{suffix}", run / "evaluations" / f"{name}.{suffix}")
    assert report(run, "--output_dir", tmp_path) == 0
    compared = {item["before"] for item in read_json(tmp_path / "metrics.json")["differences"]}
    assert "2_sft" in compared and not compared & {"3_judge", "3_reward_2"}


def test_baselines_are_beside_the_stages(whole_run: Path, tmp_path: Path) -> None:
    report(whole_run, "--output_dir", tmp_path)
    summary = read_json(tmp_path / "metrics.json")
    measured = json.loads((whole_run / "evaluations" / "2_sft.json").read_text())["metrics"]
    baselines = summary["baselines"]
    assert set(baselines) == {"elicited", "constant", "majority"}
    assert baselines["elicited"] == {"pass@1": measured["elicited/pass@1"], "text": "Working:"}
    assert baselines["constant"] == {
        "win_rate": measured["constant/win_rate"],
        "win_rate_greedy": measured["constant/win_rate_greedy"],
        **TEXTS["constant"],
    }
    assert not any("/" in metric for metric in summary["stages"]["2_sft"])
    value = f"{baselines['elicited']['pass@1']['value']:.3f}"
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "2_sft, prompted with “Working:”" in page
    assert "2_sft, always with “Have a nice day.” or “That is all.” after the answer" in page
    assert re.search(rf"<li><b>elicited</b>.*pass@1 <b>{value}</b>", page)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"| `elicited` | 2_sft, prompted with “Working:” | pass@1 | {value} (" in text
    (change,) = [line for line in text.splitlines() if line.startswith("| `4_grpo` − `elicited` |")]
    assert "| pass@1 | aim |" in change


def test_alarms_of_the_trainers_are_listed(whole_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole_run, tmp_path / "run")
    file = run / "4_grpo" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"] += [{"step": 40, "alarm/entropy": 0.01}, {"step": 41, "alarm/<b>length": 2.0, "loss": 1.0}]
    state["log_history"].append({"step": 42, "alarm/entropy": None})
    file.write_text(json.dumps(state))
    report(run)
    assert read_json(run / "report" / "metrics.json")["alarms"] == [
        {"stage": "4_grpo", "step": 40, "what": "entropy", "value": 0.01},
        {"stage": "4_grpo", "step": 41, "what": "<b>length", "value": 2.0},
    ]
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "Training raised alarms" in page and "4_grpo, step 40: entropy (0.010)" in page and "<b>length" not in page
    assert "- Alarm: 4_grpo, step 40: entropy" in (run / "report" / "report.md").read_text(encoding="utf-8")
    report(whole_run, "--output_dir", tmp_path / "quiet")
    assert read_json(tmp_path / "quiet" / "metrics.json")["alarms"] == []
    assert "alarm" not in (tmp_path / "quiet" / "index.html").read_text(encoding="utf-8").lower()


def test_page_and_markdown_show_every_stage(whole_run: Path, tmp_path: Path) -> None:
    report(whole_run, "--output_dir", tmp_path)
    for name in ("index.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        for stage in STAGES:
            assert stage in text
        assert "What is an LLM?" in text.replace("\\", "")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for chart in ("Bits per byte", "Reward-model accuracy", "Hidden taste against KL", "Answer length"):
        assert chart in page
    # The page shows the same problem before and after stage 4.
    assert "27 + 16 = 43" in page and "The answer is 34." in page
    assert str(whole_run) not in page, "where the run lay on this machine"


def test_every_figure_of_the_page_is_one_of_metrics_json(whole_run: Path, tmp_path: Path) -> None:
    report(whole_run, "--output_dir", tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    summary = read_json(tmp_path / "metrics.json")
    stages, section = summary["stages"], page[page.index('id="figures"') : page.index("By kind of example")]
    checked = 0
    for metric, described in summary["metrics"].items():
        info = metric_info(metric)
        (row,) = re.findall(
            rf'class="pin">{re.escape(described["label"])}(?: <span|<small).*?</tr>', section, re.DOTALL
        )
        cells = re.findall(r'<td[^>]* data-label="([^"]+)">(?:<b>(.*?)</b><small class="range">(.*?)</small>|–)', row)
        for stage, value, ends in cells:
            entry = stages[stage].get(metric)
            low_high = " to ".join(number(end, info.digits) for end in entry["ci95"]) if entry else ""
            assert (value, ends) == ((number(entry["value"], info.digits), low_high) if entry else ("", ""))
            checked += bool(entry)
    assert checked == sum(len(metrics.keys() - {"pass@1_by_length"}) for metrics in stages.values()) > 60
    # The strip of lengths, and each change.
    strip = page[
        page.index("pass@1 of each stage by the length") : page.index("The first held-out problem of each kind")
    ]
    for stage in ("3_ppo", "4_grpo"):
        for length, entry in stages[stage]["pass@1_by_length"].items():
            assert f'data-label="{length}"><b>{number(entry["value"])}</b>' in strip
    for item in summary["differences"]:
        info = metric_info(item["metric"])
        of = summary["baselines"] if item["before"] in summary["baselines"] else stages
        was, now = (
            number(side[item["metric"]]["value"], info.digits) for side in (of[item["before"]], stages[item["stage"]])
        )
        mark = {"better": "▲", "worse": "▼", "same": ""}[item["verdict"]]
        change = rf"{mark}[^\n]*<b>{re.escape(signed(item['value'], info.digits))}</b>"
        assert re.search(rf"{re.escape(info.label)}[^\n]*>{was} → {now}</td>[^\n]*{change}", page), item


def test_a_run_of_some_stages_shows_only_those(short_run: Path) -> None:
    assert report(short_run) == 0
    summary = read_json(short_run / "report" / "metrics.json")
    assert list(summary["stages"]) == list(UNTIL_SFT)
    held = {item["promise"] for item in summary["promises"]}
    assert held and not any(word in promise for promise in held for word in ("3_", "4_"))
    page = (short_run / "report" / "index.html").read_text(encoding="utf-8")
    assert "3_ppo" not in page and "4_grpo" not in page


def test_evaluations_alone_are_enough(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "only"
    shutil.copytree(whole_run / "evaluations", run / "evaluations")
    assert report(run) == 0
    summary = read_json(run / "report" / "metrics.json")
    assert summary["seconds"] == {} and summary["seed"] is None
    assert summary["hardware"] == {} and summary["versions"] == {} and summary["commit"] is None
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "unknown hardware" in page and platform.python_version() not in page


def test_a_step_whose_directory_has_another_name_is_counted_once(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("report"))
    record = read_json(run / "run.json")
    step = record["steps"].pop("2_sft")
    record["steps"]["2_sft_mine"] = {**step, "seconds": 321.0, "values": {"output_dir": "runs/r/2_sft"}}
    (run / "run.json").write_text(json.dumps(record))
    assert report(run) == 0
    seconds = read_json(run / "report" / "metrics.json")["seconds"]
    assert seconds["2_sft"] == 321.0 and "2_sft_mine" not in seconds


def test_memory_is_reported_where_it_was_recorded(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("report"))
    record = read_json(run / "run.json")
    # Runs of earlier releases recorded none, and 0 stands for a peak that was not measured.
    for name, step in record["steps"].items():
        del step["peak_memory"]
        step |= {"2_sft": {"peak_memory": 742_000_000}, "3_ppo": {"peak_memory": 0}}.get(name, {})
    record["steps"]["evaluate_2_sft"]["peak_memory"] = 1_190_000_000
    (run / "run.json").write_text(json.dumps(record))
    assert report(run) == 0
    assert read_json(run / "report" / "metrics.json")["peak_memory"] == {
        "2_sft": 742_000_000,
        "evaluate_2_sft": 1_190_000_000,
    }
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| `2_sft` \|[^|]*\|[^|]*\| 742 MB / 1.19 GB \|", text)
    assert re.search(r"\| `3_ppo` \|[^|]*\|[^|]*\| – \|", text)
    assert re.search(r"\| together \|[^|]*\|[^|]*\| 1.19 GB \|", text)
    assert "742 MB / 1.19 GB" in (run / "report" / "index.html").read_text(encoding="utf-8")


def test_training_logs_alone_are_enough(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "logs"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("evaluations", "report", "run.json"))
    assert report(run) == 0
    assert "Bits per byte, validation" in (run / "report" / "index.html").read_text(encoding="utf-8")
    assert read_json(run / "report" / "metrics.json")["seconds"]["1_pretrain"] == pytest.approx(90.5, abs=0.6)


def test_a_figure_that_falls_short_is_a_warning(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    file = run / "evaluations" / "2_sft.json"
    evaluation = json.loads(file.read_text())
    evaluation["metrics"]["stop_rate"]["value"] = 0.5
    file.write_text(json.dumps(evaluation))
    report(run)
    missed = [item for item in read_json(run / "report" / "metrics.json")["promises"] if not item["kept"]]
    assert ("Stop rate of 2_sft at least 0.99", 0.5) in [(item["promise"], item["measured"]) for item in missed]
    assert "Stop rate of 2_sft at least 0.99; measured 0.500" in (run / "report" / "index.html").read_text()
    assert "fall short" in (run / "report" / "report.md").read_text().replace("falls", "fall")


@pytest.mark.parametrize("change", [{"smoke": True}, {"recipe": "recipes/mine"}])
def test_only_a_full_run_of_pocket_has_its_targets(short_run: Path, tmp_path: Path, change: dict[str, object]) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | change))
    report(run)
    assert read_json(run / "report" / "metrics.json")["promises"] == []


@pytest.mark.parametrize("option", ["--targets", "--promises"])
def test_own_targets(short_run: Path, tmp_path: Path, option: str) -> None:
    targets = tmp_path / "targets.yaml"
    targets.write_text("- {stage: 1_pretrain, metric: bits_per_byte, at_most: 0.5}\n")
    report(short_run, "--output_dir", tmp_path, option, targets)
    (target,) = read_json(tmp_path / "metrics.json")["promises"]
    assert target["kept"] is False and target["measured"] > 1


def rewrite_steps(run: Path, change: Any) -> None:
    """Change run.json: no facts about the machine, and `change(name, entry)` for each step."""
    record = json.loads((run / "run.json").read_text())
    for name, entry in record["steps"].items():
        for key in ("hardware", "versions", "commit"):
            del entry[key]
        change(name, entry)
    (run / "run.json").write_text(json.dumps(record))


def test_the_machine_is_that_of_the_last_training_step(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    finished = {
        "1_pretrain": "2026-01-02",
        "2_sft": "2026-01-03",
        "evaluate_2_sft": "2026-01-05",
        "report": "2026-01-06",
    }

    def change(name: str, entry: dict[str, Any]) -> None:
        cores = {"1_pretrain": 4, "evaluate_2_sft": 2, "report": 1}.get(name, 8)
        versions = {"torch": "2.12" if name == "1_pretrain" else "2.13"}
        entry |= {"hardware": {"cores": cores}, "versions": versions, "commit": "abc"}
        entry["finished_at"] = finished.get(name, "2026-01-01")

    rewrite_steps(run, change)
    report(run)
    summary = read_json(run / "report" / "metrics.json")
    assert (summary["hardware"], summary["versions"], summary["commit"]) == ({"cores": 8}, {"torch": "2.13"}, "abc")
    (note,) = summary["notes"]
    assert "1_pretrain, evaluate_2_sft ran with different hardware and versions from 2_sft (torch 2.12)" in note
    assert capsys.readouterr().err.splitlines() == [note]


def test_steps_on_one_machine_leave_no_note(short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    rewrite_steps(run, lambda name, entry: entry.update(hardware={"cores": 8}, finished_at="2026-01-01"))
    report(run)
    summary = read_json(run / "report" / "metrics.json")
    assert summary["hardware"] == {"cores": 8} and summary["commit"] is None and summary["notes"] == []


@pytest.mark.parametrize("several", [False, True])
def test_a_report_does_not_leave_a_run_by_a_link(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], several: bool
) -> None:
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "run"
    shutil.copytree(short_run, run, ignore=shutil.ignore_patterns("report"))
    (run / "report").symlink_to(tmp_path / "elsewhere")
    more_runs = [short_run] if several else []
    with pytest.raises(SystemExit) as stopped:
        report(run, *more_runs, *(["--output_dir", tmp_path / "seeds"] if several else []))
    assert stopped.value.code == 2 and not list((tmp_path / "elsewhere").iterdir())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"RUN: {run / 'report'}: is a link to {tmp_path / 'elsewhere'}, outside of the run;")
    # The user may choose any place, and the run itself may be a link.
    (tmp_path / "link").symlink_to(run)
    assert report(tmp_path / "link", "--output_dir", run / "report") == 0
    assert (tmp_path / "elsewhere" / "index.html").exists()


def test_a_report_is_not_written_through_a_link_in_its_folder(short_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    run = tmp_path / "run"
    shutil.copytree(short_run, run, ignore=shutil.ignore_patterns("report"))
    (run / "report").mkdir()
    for name in ("index.html", "metrics.json", ".index.html.tmp", ".report.md.tmp"):
        (run / "report" / name).symlink_to(tmp_path / "mine")
    assert report(run) == 0
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (run / "report" / "index.html").is_symlink()


@pytest.mark.parametrize("several", [False, True])
def test_a_place_that_cannot_be_written_to_is_refused(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], several: bool
) -> None:
    (tmp_path / "file").write_text("")
    below_a_file = tmp_path / "file" / "more"
    runs = [short_run]
    if several:
        runs.append(shutil.copytree(short_run, tmp_path / "other"))
    for place, expected in ((below_a_file, "is not a directory"), (Path("/proc/report"), "no permission")):
        (line,) = refused(capsys, "report", *runs, "--output_dir", place).splitlines()
        assert line.startswith(f"--output_dir: {place}: ") and expected in line


def test_markdown_has_every_table_of_the_page(whole_run: Path, tmp_path: Path) -> None:
    report(whole_run, "--output_dir", tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    summary = read_json(tmp_path / "metrics.json")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    metrics = {name for stage in summary["stages"].values() for name in stage} - {"pass@1_by_length"}
    sizes = [len(metrics), 4, len(summary["differences"]), 10, 2, 2 * 4, 9 + 1]
    assert [len(table) - 2 for table in tables] == sizes
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "each row has as many cells"
    assert "| Stop rate | 0.000 (0.000 to 0.025) |" in text and "**" in tables[0][2]
    assert "| The answer is 34. | ✗ | " in text and "The answer is 30. | ✓ | " in text


def test_the_same_run_gives_the_same_report(short_run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        report(short_run, "--output_dir", tmp_path / name)
    for file in ("index.html", "metrics.json", "report.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


DAMAGE = {
    "run.json": "{",
    "evaluations/2_sft.json": "[]",
    "evaluations/1_pretrain.jsonl": '{"metric": "pass@1", "id": 1, "value": 1.0}\n{"metric": "pa\n',
    "1_pretrain/trainer_state.json": "\x00",
    "2_sft/trainer_state.json": "[" * 100_000,
    "evaluations/2_sft.jsonl": "\xff\x00[",
    "2_sft/config.json": "no",
    "2_sft/model.safetensors": "\xff" * 20,
}


@pytest.mark.parametrize("file", DAMAGE)
def test_damaged_files_are_reported_in_one_line_each(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    (run / file).write_text(DAMAGE[file], encoding="latin-1")
    assert report(run) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and file in lines[0]
    assert file in (run / "report" / "index.html").read_text(encoding="utf-8")
    assert read_json(run / "report" / "metrics.json")["notes"] == lines


def test_values_that_are_not_numbers_are_left_out(short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    file = run / "evaluations" / "2_sft.json"
    evaluation = json.loads(file.read_text())
    evaluation["metrics"] |= {
        "pass@1": {"value": float("nan"), "ci95": [0, 1], "n": 3},
        "pass@8": {"value": 0.5, "ci95": None, "n": None},
        "step_rate": "high",
        "new_metric": {"value": 3.0, "ci95": [2.0, 4.0], "n": 9},
    }
    file.write_text(json.dumps(evaluation))
    state = json.loads((run / "2_sft" / "trainer_state.json").read_text())
    state["log_history"] += [{"step": 999, "loss": float("inf")}, {"step": 1000, "loss": "x"}]
    (run / "2_sft" / "trainer_state.json").write_text(json.dumps(state))
    assert report(run) == 0
    metrics = read_json(run / "report" / "metrics.json")["stages"]["2_sft"]
    assert "pass@1" not in metrics and "step_rate" not in metrics
    assert metrics["pass@8"] == {"value": 0.5, "ci95": None, "n": None}
    assert metrics["new_metric"]["value"] == 3.0
    assert "new metric" in (run / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "no such directory"),
        (lambda path: path.mkdir(), "has neither an evaluation nor a training log"),
    ],
)
def test_a_path_that_is_not_a_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, expected: str
) -> None:
    make(tmp_path / "run")
    (line,) = refused(capsys, "report", tmp_path / "run").splitlines()
    assert expected in line and str(tmp_path / "run") in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stage: 2_sft", "must be a list"),
        ("- {stage: 2_sft, metric: stop_rate}", "at_least or at_most"),
        ("- {stage: 2_sft, metric: stop_rate, atleast: 1}", "unexpected keyword argument 'atleast'"),
        ("- {stage: 2_sft, metric: stop_rate, at_least: 1, how: much}", "how must be"),
        ("- [", "cannot be read"),
        ("- &a [*a]", "must be a mapping"),
        ("\n".join(["- &x0 [1]"] + [f"- &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12)]), "a mapping"),
    ],
)
def test_wrong_targets_are_refused_in_one_line(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    (tmp_path / "targets.yaml").write_text(text)
    options = ["--targets", tmp_path / "targets.yaml", "--output_dir", tmp_path]
    lines = refused(capsys, "report", short_run, *options).splitlines()
    assert len(lines) == max(1, text.count("- &x")), "one line per wrong entry"
    assert all(line.startswith("--targets: ") and expected in line and len(line) < 500 for line in lines)


def test_help_imports_neither_torch_nor_jinja() -> None:
    code = (
        "import sys; from pipeline.__main__ import build_parser; build_parser(['report']).format_help();"
        "print(sorted({'torch', 'jinja2', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def test_a_report_imports_neither_torch_nor_evaluate(short_run: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; from pipeline.__main__ import main; main(['report', {str(short_run)!r}, '--output_dir',"
        f" {str(tmp_path)!r}]); print(sorted({{'torch', 'transformers', 'evaluate', 'datasets'}} & set(sys.modules)))"
    )
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize(("ci", "code", "outcome"), [("", 5, "1 skipped"), ("true", 1, "1 error")])
def test_without_a_browser_the_tests_of_the_pages_are_skipped_but_fail_in_ci(
    tmp_path: Path, ci: str, code: int, outcome: str
) -> None:
    file = Path(__file__).with_name("test_report_browser.py")
    command = [sys.executable, "-m", "pytest", "-ra", "-k", "dark_and_light", str(file)]
    environment = os.environ | {"CI": ci, "PATH": str(tmp_path)}
    process = subprocess.run(command, capture_output=True, text=True, cwd=file.parents[2], env=environment)
    assert process.returncode == code and outcome in process.stdout, process.stdout
    assert process.stdout.count("to run the tests of the pages: apt-get install") == 1 + bool(ci)


def run_python(code: str) -> str:
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    return process.stdout.strip()


def test_what_is_not_a_file_is_not_read(short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(short_run, tmp_path / "run")
    for name in ("run.json", "2_sft/model.safetensors", "evaluations/2_sft.jsonl"):
        (run / name).unlink()
        os.mkfifo(run / name)
    assert report(run) == 0
    notes = capsys.readouterr().err
    assert [notes.count(f"{run / name}:") for name in ("run.json", "2_sft/model.safetensors")] == [1, 1]
