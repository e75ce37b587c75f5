"""Evaluation on the user's own data: what stages train on, what evaluate.yaml names, and judges of one's own."""

import gzip
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

from pipeline.__main__ import main
from pipeline.data.arguments import DataArguments
from pipeline.data.splits import load_splits
from pipeline.errors import UserError
from pipeline.evaluation import metrics
from pipeline.evaluation.checks import check
from pipeline.evaluation.evaluate_yaml import (
    EvaluationArguments,
    RunFacts,
    Settings,
    Source,
    complete,
    find_settings,
    from_record,
    read_record,
    to_record,
)
from pipeline.evaluation.held_out import read_held_out
from pipeline.evaluation.parts import Part, Reader
from pipeline.models.generation import Completion
from pipeline.tools import chat_model
from tests.helpers import small_model, vllm_stub
from tests.helpers.files import write_rows
from tests.helpers.refusals import refused

OWN = "tests.helpers.own_functions:{}"
FRENCH = [{"question": f"Combien font {i} et {i + 1} ?", "answer": f"C'est ça.\n#### {2 * i + 1}"} for i in range(60)]


def evaluate(run: Path, stage: str, *options: str, name: str = "") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    named = ["--name", name] if name else []
    assert main(["evaluate", str(run), "--stage", stage, "--samples", "2", *named, *options]) == 0
    path = run / "evaluations" / name / f"{stage}.json"
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    return json.loads(path.read_text()), [json.loads(line) for line in lines]


def wrong_option(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the line about the one option that is wrong."""
    error = refused(capsys, "evaluate", *arguments)
    (line,) = [line for line in error.splitlines() if line.startswith("--")]
    return line


def write_stage(run: Path, stage: str, seed: int = 0, **arguments: Any) -> None:
    """Write a model, and the arguments that a recipe leaves beside it."""
    small_model.save_model(run / stage, seed)
    (run / stage / "arguments.json").write_text(json.dumps({"dataset_test_split": "validation", **arguments}))


@pytest.mark.parametrize("value", [2024, 1.5, True, [2024], [[2024]], {"a": 1}, [None], [{"a": 1}]])
def test_values_of_a_wrong_type_are_left_to_the_check_of_their_step(value: object) -> None:
    values = dict.fromkeys(("model_name_or_path", "dataset_name", "reward_funcs", "reward_model_path"), value)
    stages = [("2_sft", "sft", values), ("3_ppo", "ppo", values), ("4_grpo", "grpo", values)]
    assert set(RunFacts.of_stages(stages, Path("r")).trained_on) > {"instructions", "problems"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "jsonl.gz"])
def test_the_rows_that_a_stage_holds_out_are_measured_without_a_file(tmp_path: Path, kind: str) -> None:
    run, questions = tmp_path / "run", write_rows(tmp_path / f"questions.{kind}", FRENCH)
    with gzip.open(tmp_path / "text.txt.gz", "wt") as file:
        file.writelines(f"Ligne {i} : {small_model.TEXT}" for i in range(64 * 41))
    write_stage(run, "1_pretrain", dataset_name=str(tmp_path / "text.txt.gz"), document="lines:64")
    columns = {"prompt_column": "question", "completion_column": "answer"}
    write_stage(run, "2_sft", seed=1, dataset_name=questions, max_length=40, **columns)
    write_stage(run, "4_grpo", dataset_name=questions, max_completion_length=8, prompt_column="question")
    result, examples = evaluate(run, "2_sft", "--limit", "50")
    metrics = result["metrics"]
    assert {"bits_per_byte", "answer_bits_per_byte", "stop_rate", "mean_length", "pass@1", "maj@2"} <= set(metrics)
    assert "instruction_accuracy" not in metrics and "win_rate" not in metrics, "nothing grades or judges these rows"
    ids = {metric: [e["id"] for e in examples if e["metric"] == metric] for metric in metrics}
    assert ids["bits_per_byte"] == ids["answer_bits_per_byte"] == ids["pass@1"] == [0, 20, 40]
    assert any(line.startswith("win rate: not measured") for line in result["left_out"])
    assert result["cut_off"]["problems"]["limit"] == 8 and result["cut_off"]["instructions"]["limit"] == 40
    # 38 documents, and the file's rows that are not held out, of both stages that train on it.
    assert result["overlap"]["problems"]["trained_on"] == 38 + 57 + 57


def test_training_and_evaluation_hold_out_the_same_rows(tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"Is {i}?", "chosen": f"It is {i}.", "rejected": "No." if i % 7 else f"It is {i}."}
        for i in range(60)
    ]
    path = write_rows(tmp_path / "pairs.jsonl", pairs)
    train, held_out = load_splits(DataArguments(path, validation_share=0.1), "preference", evaluation=False)
    assert held_out is None
    trained = {row["prompt"][0]["content"] for row in train}
    run = tmp_path / "run"
    write_stage(run, "3_reward", dataset_name=path, validation_share=0.1)
    write_reward_model(run / "3_reward")
    result, examples = evaluate(run, "3_reward")
    # The answers of the first row are equal, and so are those of every seventh.
    assert [one["id"] for one in examples] == [10, 20, 30, 40, 50] and result["metrics"]["reward_accuracy"]["n"] == 5
    assert trained == {pairs[i]["prompt"] for i in range(60) if i % 10 and i % 7}


def write_reward_model(folder: Path, seed: int = 0) -> None:
    if not folder.exists():
        small_model.save_model(folder, seed)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    config.architectures = None
    LlamaForSequenceClassification(config).save_pretrained(folder)


def test_rows_that_a_stage_trains_on_are_not_measured(tmp_path: Path) -> None:
    run, text = tmp_path / "run", small_model.write_text(tmp_path / "text.txt", lines=130)
    write_stage(run, "1_pretrain", dataset_name=text, validation_share=0.0, document="lines:64")
    result, _ = evaluate(run, "1_pretrain")
    assert result["metrics"] == {} and any(line.startswith("bits per byte: not meas") for line in result["left_out"])
    named, _ = evaluate(run, "1_pretrain", "--text", text, name="all")
    assert named["overlap"]["text"]["found"] == named["overlap"]["text"]["rows"] == 3, "it is said"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose stage 2 can be measured on questions that have answers."""
    run = tmp_path / "run"
    questions = write_rows(tmp_path / "questions.jsonl", FRENCH)
    columns = {"prompt_column": "question", "completion_column": "answer"}
    write_stage(run, "2_sft", dataset_name=questions, max_length=12, **columns)
    return run


def test_what_a_file_names_is_measured_and_graded_as_it_says(run: Path, tmp_path: Path) -> None:
    problems = [{"q": f"{i} + 1?", "a": f"{i}", "kind": "sum"} for i in range(5)]
    content = {
        "problems": {
            "dataset_name": write_rows(tmp_path / "problems.jsonl", problems),
            "prompt_column": "q",
            "answer_column": "a",
            "grade": OWN.format("even_answers_are_right"),
        },
        "fixed_prompts": ["Ça va ?"],
        "max_new_tokens": 4,
        "elicit": "Ainsi",
    }
    config = tmp_path / "evaluate.yaml"
    config.write_text(yaml.safe_dump(content))
    result, examples = evaluate(run, "2_sft", "--config", str(config), "--max_new_tokens", "3")
    right = [(e["id"], e["value"]) for e in examples if e["metric"] == "pass@1"]
    assert right == [(i, float(i % 2 == 0)) for i in range(5)]
    assert "maj@2" not in result["metrics"], "samples cannot vote on what a function judges"
    assert [answer["prompt"] for answer in result["answers"]] == ["Ça va ?"]
    assert result["texts"]["elicited"] == {"text": "Ainsi"}
    assert {counts["limit"] for counts in result["cut_off"].values()} == {3}, "options override the file"
    assert "answer_bits_per_byte" in result["metrics"], "what the file does not name is the stages' own"


def test_one_row_has_no_interval_and_no_verdict(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = evaluate(run, "2_sft", "--limit", "1")
    assert result["metrics"]["mean_length"] == {"value": 12.0, "ci95": None, "n": 1}
    assert main(["report", str(run)]) == 0
    summary = json.loads((run / "report" / "metrics.json").read_text())
    assert summary["stages"]["2_sft"]["mean_length"]["ci95"] is None
    capsys.readouterr()
    assert main(["compare", str(run), "--against", str(run)]) == 0
    assert not {"better", "worse"}.intersection(capsys.readouterr().out.split())


def test_null_leaves_data_out(run: Path, tmp_path: Path) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"instructions: null\nproblems: {run.parent}/questions.jsonl\n")
    result, _ = evaluate(run, "2_sft", "--config", str(config), "--limit", "2")
    assert "mean_length" not in result["metrics"] and "pass@1" in result["metrics"]
    assert "stop_rate" in result["metrics"], "without instructions, it is that of the problems"


def test_other_data_never_replace_the_runs_own_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(run, "2_sft", "--limit", "2")
    own = (run / "evaluations" / "2_sft.json").read_bytes()
    record = {"steps": {"evaluate_2_sft": {"finished_at": "today"}}}
    (run / "run.json").write_text(json.dumps(record))
    text = small_model.write_text(tmp_path / "shakespeare.txt", lines=70)
    error = wrong_option(capsys, run, "--stage", "2_sft", "--text", text, "--samples", 2, "--limit", 2)
    assert error.startswith("--name: nothing: ") and "text" in error
    result, _ = evaluate(run, "2_sft", "--text", text, name="shakespeare")
    assert set(result["metrics"]) == {"bits_per_byte"}, "only what was named"
    assert (run / "evaluations" / "2_sft.json").read_bytes() == own
    # Without texts of its own, an evaluation measures what it measured before.
    evaluate(run, "2_sft", "--limit", "2")
    assert main(["report", str(run)]) == 0
    summary = json.loads((run / "report" / "metrics.json").read_text())
    assert summary["other"]["shakespeare"]["2_sft"]["bits_per_byte"] == result["metrics"]["bits_per_byte"]
    assert "bits_per_byte" not in summary["stages"]["2_sft"]
    assert summary["cut_off"]["2_sft"]["instructions"]["limit"] == 12
    report = (run / "report" / "report.md").read_text()
    assert "`shakespeare`" in report and "were cut off at 12 tokens" in report


def test_rows_that_any_stage_trains_on_are_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = [{"text": f"{i}: " + " ".join(f"w{i}x{j}" for j in range(30))} for i in range(40)]
    rows[20]["text"] = rows[3]["text"] + " and more"
    write_stage(run, "1_pretrain", dataset_name=write_rows(tmp_path / "a.jsonl", rows))
    # Two pairs are made of test problems; all problems end in the same words.
    problems = [" ".join(f"p{i}x{j}" for j in range(14)) + " Put the answer in a box" * 4 for i in range(30)]
    folder = tmp_path / "problems"
    folder.mkdir()
    for split, some in (("train", problems[5:]), ("test", problems[:5])):
        write_rows(folder / f"{split}.parquet", [{"question": text, "answer": "1"} for text in some])
    pairs = [{"prompt": text, "chosen": "1", "rejected": "2"} for text in problems[3:]]
    for stage, name in (("3_reward", write_rows(tmp_path / "pairs.jsonl", pairs)), ("4_grpo", str(folder))):
        (run / stage).mkdir()
        (run / stage / "arguments.json").write_text(json.dumps({"dataset_name": name}))
    first, _ = evaluate(run, "1_pretrain")
    found = first["overlap"]["problems"]
    assert found["rows"] == 5 and found["found"] == found["in"]["pairs"] > 0
    text = first["overlap"]["text"]
    assert (text["rows"], text["found"], text["n"], text["in"]) == (2, 1, 13, {"text": 1})


def test_answers_that_the_context_cuts_off_are_counted_and_not_given_room(run: Path, tmp_path: Path) -> None:
    long = [{"question": "Pourquoi ? " * n, "answer": "1"} for n in (1, 19, 400)]
    path = write_rows(tmp_path / "long.jsonl", long)
    options = ["--problems", path, "--prompt_column", "question", "--max_new_tokens", "60"]
    result, examples = evaluate(run, "2_sft", *options, name="long")
    answers = [example["answer"] for example in examples if example["metric"] == "pass@1"]
    assert len(answers) == 3 and answers[2] == ""
    tokens = {e["id"]: e["value"] for e in examples if e["metric"] == "reasoning_length"}
    tokenizer = small_model.tokenizer()
    for number, row in enumerate(long[:2]):
        asked = [{"role": "user", "content": row["question"]}]
        room = 256 - len(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
        assert 0 < tokens[number] <= min(60, room)
    assert result["cut_off"]["problems"]["cut off"] >= 3, "one greedy answer and two samples at least"


def test_a_stage_without_a_chat_template_is_measured_on_text(run: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "2_sft")
    tokenizer.chat_template = None
    (run / "2_sft" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(run / "2_sft")
    result, _ = evaluate(run, "2_sft", "--text", small_model.write_text(tmp_path / "text.txt", lines=70))
    assert set(result["metrics"]) == {"bits_per_byte"}
    assert "answers: not measured, because the tokenizer of this stage has no chat template" in result["left_out"]


def test_system_messages_are_kept(run: Path, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                *small_model.conversation(f"{i}?", "Ja, das ist gut."),
            ]
        }
        for i in range(3)
    ]
    path = write_rows(tmp_path / "talk.jsonl", rows)
    with_system, _ = evaluate(run, "2_sft", "--instructions", path, name="with")
    without = write_rows(tmp_path / "plain.jsonl", [{"messages": row["messages"][1:]} for row in rows])
    plain, _ = evaluate(run, "2_sft", "--instructions", without, name="without")
    told, _ = evaluate(run, "2_sft", "--instructions", without, "--system_prompt", "Be kind.", name="told")
    bits = [one["metrics"]["answer_bits_per_byte"]["value"] for one in (with_system, plain, told)]
    assert bits[0] == bits[2] != bits[1]


def test_a_function_judges_the_win_rate_and_the_report_names_it(run: Path, tmp_path: Path) -> None:
    write_stage(
        run, "3_ppo", seed=1, dataset_name=write_rows(tmp_path / "prompts.jsonl", FRENCH), prompt_column="question"
    )
    for judge, greedy in (("longer_answers_win", 0.5), ("the_first_wins", 1.0)):
        name = OWN.format(judge)
        result, _ = evaluate(run, "2_sft", "--judge", name, "--max_new_tokens", "5")
        assert result["judge"] == f"the function {name}"
        assert result["metrics"]["win_rate_greedy"]["value"] == greedy
        assert result["metrics"]["constant/win_rate_greedy"]["value"] == 1.0, "by a text chosen on rows trained on"
        assert main(["report", str(run)]) == 0
        assert f"judged by the function {name}" in (run / "report" / "index.html").read_text().replace("&#39;", "'")


def test_vllm_samples_for_the_model_and_its_opponent(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_rows(tmp_path / "prompts.jsonl", FRENCH)
    write_stage(run, "3_ppo", seed=1, dataset_name=questions, prompt_column="question")
    monkeypatch.setattr("pipeline.hardware.fast_dtype", lambda: torch.float32)
    options = ["--judge", OWN.format("longer_answers_win"), "--max_new_tokens", "5", "--limit", "8"]
    assert "vLLM is not installed" in wrong_option(capsys, run, "--stage", "3_ppo", "--vllm")
    monkeypatch.setitem(sys.modules, "vllm", vllm_stub.module())
    monkeypatch.setattr("pipeline.models.vllm_sampler.validate_vllm", lambda: None)
    monkeypatch.setattr(vllm_stub.LLM, "engines", engines := [])
    plain, answers = evaluate(run, "3_ppo", *options, name="plain")
    assert not engines
    result, same = evaluate(run, "3_ppo", *options, "--vllm", name="vllm")
    assert len(engines) == 2 and sum(engine.settings["gpu_memory_utilization"] for engine in engines) < 1
    assert result["settings"]["vllm"] is True and plain["settings"]["vllm"] is None
    assert result["answers"] == plain["answers"], "greedy"
    greedy = [[row for row in rows if row["metric"] == "win_rate_greedy"] for rows in (answers, same)]
    assert greedy[0] == greedy[1] and greedy[0]
    drawn = [request.seed for engine in engines for request in engine.requests if request.temperature > 0]
    assert len(set(drawn)) == len(drawn) > 0, "each prompt has its own random numbers"


def test_a_reward_model_judges_unless_ppo_is_trained_to_please_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {"dataset_name": write_rows(tmp_path / "prompts.jsonl", FRENCH), "prompt_column": "question"}
    own = {"output_dir": str(run / "3_ppo"), "reward_model_path": [str(run / "3_reward")]}
    write_stage(run, "3_ppo", seed=1, **own, **prompts)
    write_reward_model(run / "3_judge", seed=5)
    result, _ = evaluate(run, "3_ppo", "--judge", str(run / "3_judge"), "--max_new_tokens", "5")
    assert result["judge"] == f"the reward model {run / '3_judge'}"
    assert 0 <= result["metrics"]["win_rate"]["value"] <= 1
    (tmp_path / "link").symlink_to(run / "3_reward")
    for name in ("run/3_reward", "run/3_reward/", "run/../run/3_reward", "run/3_reward/checkpoint-7", "link"):
        error = wrong_option(capsys, run, "--stage", "3_ppo", "--judge", f"{tmp_path}/{name}")
        assert error.startswith("--judge: ") and "PPO is trained to please" in error
    moved = run.rename(tmp_path / "moved")
    assert "PPO is trained to please" in wrong_option(capsys, moved, "--stage", "3_ppo", "--judge", moved / "3_reward")
    moved.rename(run)
    later, _ = evaluate(run, "3_ppo", "--judge", str(run / "9_later"), "--max_new_tokens", "5")
    assert "win_rate" not in later["metrics"] and any("not trained yet" in line for line in later["left_out"])


SWITCH = "{% if quick %}quick{% else %}slow{% endif %}"


@pytest.mark.parametrize("stage", ["2_sft", "4_grpo"])
def test_prompts_are_written_with_the_template_arguments_of_the_stages(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    prompts = {"dataset_name": write_rows(tmp_path / "prompts.jsonl", FRENCH), "prompt_column": "question"}
    write_stage(run, "3_ppo", max_completion_length=4, chat_template_kwargs={"quick": True}, **prompts)
    write_stage(run, "4_grpo", max_completion_length=4, chat_template_kwargs={"quick": True}, **prompts)
    for name in ("2_sft", "4_grpo"):
        tokenizer = AutoTokenizer.from_pretrained(run / name)
        tokenizer.chat_template = small_model.CHATML + SWITCH
        tokenizer.save_pretrained(run / name)
    ends: set[tuple[str, str]] = set()

    def spy(model: Any, tokenizer: Any, prompts: Any, *, samples: int = 1, **options: Any) -> Any:
        for text in map(tokenizer.decode, prompts):
            # The file for instruction tuning has the same questions as the others.
            ends.add((str(options["max_new_tokens"]), "quick" if "quick" in text[-20:] else "slow"))
        return [[Completion("no", [5], True)] * samples for _ in prompts]

    monkeypatch.setattr(chat_model, "generate", spy)
    scored = []
    monkeypatch.setattr(
        metrics, "answer_losses", lambda *args, **options: scored.append(options["template"]) or [(0.0, 0)] * 2
    )
    evaluate(run, stage, "--judge", OWN.format("longer_answers_win"), "--limit", "2", "--elicit", "So")
    assert scored == [{"quick": True} if stage == "4_grpo" else {}]
    instructions = {"quick" if stage == "4_grpo" else "slow"}
    assert {end for limit, end in ends if limit == "12"} == instructions
    assert {end for limit, end in ends if limit != "12"} == {"quick"}


def facts_of(**of_grpo: Any) -> RunFacts:
    """Return the facts of a run of SFT, PPO and GRPO; the arguments are further ones of GRPO."""
    data = {"dataset_name": "q.jsonl"}
    stages = [("2_sft", "sft", data), ("3_ppo", "ppo", data), ("4_grpo", "grpo", data | of_grpo)]
    return RunFacts.of_stages(stages, Path("runs/x"))


def test_a_stage_without_template_arguments_is_asked_with_those_of_the_stage_that_trains_on_the_data() -> None:
    facts = facts_of(chat_template_kwargs='{"quick": true}')
    quick = {"quick": True}
    # GRPO trains on problems.
    by_key = {key: facts.template_for("2_sft", key) for key in ANSWERED}
    assert by_key == {"instructions": {}, "problems": quick, "prompts": {}}
    by_key = {key: facts.template_for("4_grpo", key) for key in ANSWERED}
    assert by_key == {"instructions": quick, "problems": quick, "prompts": quick}


def test_template_arguments_are_recorded_or_follow_from_the_stages(run: Path) -> None:
    assert facts_of().to_record()["chat_template_kwargs"] is None, "as in earlier records"
    # A record of an earlier release lacks the key, so the arguments in the directory of the stage apply.
    facts = facts_of(chat_template_kwargs='{"quick": true}')
    record = to_record(complete({"limit": 7}, facts), facts)
    del record["chat_template_kwargs"]
    (run / "run.json").write_text(json.dumps({"steps": {"evaluate_2_sft": {"values": record}}}))
    write_stage(run, "4_grpo", dataset_name="q.jsonl", chat_template_kwargs={"quick": False})
    templates = {"4_grpo": {"quick": False}, "problems": {"quick": False}}
    assert to_record(*read_record(run, "2_sft")) == record | {"chat_template_kwargs": templates}


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    facts = RunFacts.of_stages(STAGES, Path("runs/x"))
    for content in ({}, {"limit": 3, "problems": "q.jsonl", "pairs": None, "against": "1_pretrain"}):
        record = to_record(complete(content, facts), facts)
        read = from_record(json.loads(json.dumps(record)))
        assert to_record(*read) == record
        (tmp_path / "run.json").write_text(json.dumps({"steps": {"evaluate_2_sft": {"values": record}}}))
        assert read_record(tmp_path, "4_grpo") == read
    assert set(record) <= {item.name for kind in (EvaluationArguments, RunFacts) for item in fields(kind)}


def test_named_data_without_the_system_prompt_of_training_are_warned_of(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = write_rows(tmp_path / "problems.jsonl", FRENCH)
    write_stage(run, "4_grpo", dataset_name=questions, prompt_column="question", system_prompt="Réfléchis.")
    _, facts = read_record(run, "4_grpo")
    columns = {"dataset_name": write_rows(tmp_path / "others.jsonl", FRENCH), "prompt_column": "question"}
    for given, warned in ({}, True), ({"system_prompt": "Pense."}, False):
        caplog.clear()
        content = complete({"problems": columns | given}, facts)
        read_held_out(find_settings(run, content, facts), ["problems"], baselines=False)
        assert ("was trained with 'Réfléchis.'" in caplog.text) is warned
    caplog.clear()
    read_held_out(find_settings(run, complete({}, facts), facts), [], baselines=False)
    assert "Réfléchis" not in caplog.text


def test_people_vote_on_the_answers_that_were_written_down_for_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # People judge a single answer to each prompt.
    monkeypatch.setattr("pipeline.evaluation.win_rate.SAMPLES", 1)
    prompts = {"dataset_name": write_rows(tmp_path / "prompts.jsonl", FRENCH), "prompt_column": "question"}
    write_stage(run, "3_ppo", seed=1, **prompts)
    options = ["--judge", "votes", "--max_new_tokens", "5"]
    result, _ = evaluate(run, "3_ppo", *options)
    assert "win_rate" not in result["metrics"]
    votes = run / "votes" / "3_ppo.jsonl"
    lines = [json.loads(line) for line in votes.read_text().splitlines()]
    assert lines and all(line["choice"] is None and line["first"] != line["second"] for line in lines)
    sampled = [
        (example["answer"], example["opponent"])
        for example in evaluate(run, "3_ppo", "--judge", OWN.format("the_first_wins"), *options[2:])[1]
        if example["metric"] == "win_rate"
    ]
    # People prefer the answer of stage 3 wherever it is one of the two.
    for line in lines:
        pair = line["first"], line["second"]
        line["choice"] = "first" if pair in sampled else "second" if pair[::-1] in sampled else None
    last = next(line for line in lines if line["choice"])
    del lines[lines.index(last)]
    write_rows(votes, lines)
    result, _ = evaluate(run, "3_ppo", *options)
    assert result["judge"] == "people's votes"
    assert (result["metrics"]["win_rate"]["value"], result["metrics"]["win_rate"]["n"]) == (1.0, 2)
    assert "win_rate: 1 of 3 matches have not been judged" in result["left_out"]
    again = [json.loads(line) for line in votes.read_text().splitlines()]
    assert {**last, "choice": None} in again, "and it is written down again"
    votes.write_text('{"prompt": [], "first": "a", "second": "b", "choice": "left"}\n')
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--stage", "3_ppo", *options])


def test_only_a_sample_of_a_large_split_is_read() -> None:
    class Counting(Dataset):
        read = 0

        def __iter__(self) -> Any:
            for row in super().__iter__():
                Counting.read += 1
                yield row

    data = Dataset.from_dict({"text": [str(i) for i in range(5000)]})
    held_out = Part(data, Source("a"), "a", share=0.05)
    rows = list(held_out.sample(100))
    assert len(rows) == 100 and all(number % 20 == 0 and row["text"] == str(number) for number, row in rows)
    trained_on = Part(data, Source("a"), "a", share=0.05, trained_on=True)
    assert [number for number, _ in trained_on.sample(10_000)] == [i for i in range(5000) if i % 20]
    stream = Part(data.to_iterable_dataset(), Source("a"), "a", share=0.05)
    assert [number for number, _ in stream.sample(3)] == [0, 20, 40]


def test_rows_that_training_leaves_out_of_a_data_set_of_the_hub_are_not_measured(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": ["one", None, "three"]})
    reader = Reader(Settings(tmp_path, EvaluationArguments(), RunFacts(str(tmp_path))), ())
    found = reader.read("text", Part(data, Source("someone/texts"), "someone/texts"), 10)
    assert [(row["id"], row["text"]) for row in found] == [(0, "one"), (2, "three")]
    with pytest.raises(UserError, match="row 1: the text is None; correct or remove that row"):
        reader.read("text", Part(data, Source(str(tmp_path)), "texts"), 10)
    with pytest.raises(UserError, match="row 0: the text is None; correct or remove that row"):
        nothing = Dataset.from_dict({"text": [None] * 5})
        reader.read("text", Part(nothing, Source("someone/texts"), "someone/texts"), 10)


ANSWERED = ("instructions", "problems", "prompts")
STAGES = [
    ("1_pretrain", "pretrain", {"dataset_name": "novel.txt", "block_size": 64}),
    ("2_sft", "sft", {"dataset_name": "runs/x/data", "dataset_config": "talk", "max_length": 256}),
    ("2_sft_more", "sft", {"dataset_name": "more.jsonl", "completion_column": "answer", "max_length": 512}),
    ("3_ppo", "ppo", {"dataset_name": "p.jsonl", "reward_model_path": "runs/x/3_reward", "max_completion_length": 99}),
    (
        "4_grpo",
        "grpo",
        {"dataset_name": "q.jsonl", "validation_share": 0.1, "reward_funcs": ["choice", "answer_format"]},
    ),
]


@pytest.mark.parametrize(("saved", "measured"), [({"document": None}, None), ({"document": "file"}, "file")])
def test_text_is_cut_as_the_stage_that_trained_on_it_cut_it(
    tmp_path: Path, saved: dict[str, str | None], measured: str | None
) -> None:
    (tmp_path / "1_pretrain").mkdir()
    values = {"dataset_name": "novel.txt", "output_dir": str(tmp_path / "1_pretrain"), **saved}
    (tmp_path / "1_pretrain" / "arguments.json").write_text(json.dumps(values))
    content, facts = read_record(tmp_path, "1_pretrain")
    assert content["text"] == facts.trained_on["text"]
    assert content["text"].get("document") == measured


@pytest.mark.parametrize(("reward", "grade"), [("choice", "choice"), ("math_answer", None), ("call_cost", None)])
def test_the_first_reward_grades_held_out_problems_if_it_says_what_is_right(reward: str, grade: str | None) -> None:
    values = {"dataset_name": "q.jsonl", "reward_funcs": [reward]}
    facts = RunFacts.of_stages([("4_grpo", "grpo", values)], Path("runs/x"))
    assert to_record(complete({}, facts), facts)["trained_on"]["problems"].get("grade") == grade


def test_settings_follow_from_the_stages() -> None:
    facts = RunFacts.of_stages(STAGES, Path("runs/x"))
    settings = to_record(complete({"limit": 3, "problems": "q.jsonl", "pairs": None}, facts), facts)
    assert settings["text"] == {"dataset_name": "novel.txt", "validation_share": 0.05}
    assert settings["instructions"]["dataset_name"] == "more.jsonl", "those of the last stage of instruction tuning"
    assert settings["against"] == "2_sft_more" and settings["base"] is None
    assert settings["trained_on"]["problems"]["grade"] == "choice"
    assert settings["problems"] == {"dataset_name": "q.jsonl", "validation_share": 0.1}, "with the rows held out"
    assert settings["lengths"] == {"instructions": 512, "problems": None, "prompts": 99}
    assert settings["reward_models"] == ["runs/x/3_reward"]
    assert settings["limit"] == 3 and settings["samples"] == 8 and settings["pairs"] is None


def test_the_opponent_is_the_instruction_tuning_with_the_highest_number(tmp_path: Path) -> None:
    for stage in ("9_sft", "10_sft"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "arguments.json").write_text(json.dumps({"dataset_name": f"{stage}.jsonl"}))
    content, facts = read_record(tmp_path, "9_sft")
    assert content["against"] == "10_sft" and content["instructions"]["dataset_name"] == "10_sft.jsonl"
    # Without facts about the stages, the opponent is a directory of the run.
    assert find_settings(tmp_path, {}, replace(facts, against=None)).against == "10_sft"


def test_a_model_that_no_stage_makes_is_the_base() -> None:
    stages = [("3_ppo", "ppo", {"dataset_name": "p", "model_name_or_path": "org/model"})]
    stages += [("4_grpo", "grpo", {"dataset_name": "q", "model_name_or_path": "runs/x/3_ppo"})]
    facts = RunFacts.of_stages(stages, Path("runs/x"))
    assert facts.base == "org/model" and facts.against == "0_base"


def test_everything_that_is_wrong_with_a_file_is_said_at_once() -> None:
    content = {"lmit": 3, "limit": 0, "samples": 5000, "judge": "runs/x/3_reward", "text": "nowhere/a.txt"}
    content["problems"] = {"dataset_name": "q.jsonl", "prompt_colum": "q", "grade": "exakt"}
    content["pairs"] = {"dataset_name": ["a.jsonl", "b.jsonl"]}
    facts = RunFacts.of_stages(STAGES, Path("runs/x"))
    problems = check(complete(content, facts), facts, "evaluate.yaml: ")
    assert sorted(problem.field.removeprefix("evaluate.yaml: ") for problem in problems) == [
        *("judge", "limit", "lmit", "pairs: dataset_name", "problems: dataset_name", "problems: grade"),
        *("problems: prompt_colum", "samples", "text: dataset_name"),
    ]
    assert all(isinstance(problem.remedy, str) for problem in problems) and UserError(*problems)


def test_rows_of_every_data_set_that_a_stage_trains_on_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {name: [" ".join(f"{name}{i}x{j}" for j in range(20)) for i in range(40)] for name in "abc"}
    for name, texts in words.items():
        write_rows(tmp_path / f"{name}.jsonl", [{"question": text, "answer": "1"} for text in texts])
    write_stage(tmp_path / "run", "2_sft", dataset_name=["a.jsonl", "b.jsonl"])
    for named in ("b.jsonl", "./b.jsonl", str(tmp_path / "b.jsonl")):
        found, _ = evaluate(tmp_path / "run", "2_sft", "--instructions", named, name="b")
        assert found["overlap"]["instructions"] | {"n": 0} == {
            "rows": 2, "trained_on": 76, "n": 0, "in": {}, "found": 0
        }  # fmt: skip
    # Rows of the second data set, in a file of another name, are found among all that were trained on.
    write_rows(tmp_path / "d.jsonl", [{"question": text, "answer": "1"} for text in words["b"]])
    found, _ = evaluate(tmp_path / "run", "2_sft", "--instructions", "d.jsonl", name="d")
    assert found["overlap"]["instructions"]["in"] == {"instructions (b.jsonl)": 38}
    own, _ = evaluate(tmp_path / "run", "2_sft")
    assert own["overlap"]["instructions"]["rows"] == 2 and own["settings"]["instructions"]["dataset_name"] == "a.jsonl"


def test_rows_that_a_stage_keeps_are_divided_as_it_divided_them(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": "1", "source": f"s{i % 2}"} for i in range(100)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    stage = {"dataset_name": path, "keep_rows": ["source=s1"]}
    content = complete({"problems": path}, RunFacts.of_stages([("2_sft", "sft", stage)], tmp_path))
    assert content["problems"] == {**stage, "validation_share": 0.05}
