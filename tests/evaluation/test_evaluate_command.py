"""`python -m pipeline evaluate` on a run of miniature size."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

from pipeline.__main__ import main
from pipeline.data.sources import open_source
from pipeline.evaluation.held_out import FIXED_PROMPTS
from pipeline.evaluation.parts import subsample
from pipeline.evaluation.win_rate import SAMPLES
from pipeline.stages import HELD_OUT
from tests.helpers import small_model
from tests.helpers.files import write_rows
from tests.helpers.refusals import refused


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content):
    return [{"role": "assistant", "content": content}]


def write_split(folder, rows, split="test"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


def write_data(run):
    rule = {"require": [["cat"]], "reject": ["dog"], "max_words": 9, "test": ""}
    code = {"require": [], "reject": [], "max_words": 0, "test": "assert one() == 1"}
    questions = [
        {"messages": user(f"What is {i}?") + assistant("A cat."), "kind": "question", **rule} for i in range(4)
    ]
    functions = [
        {"messages": user(f"Write one{i}.") + assistant("def one(): return 1"), "kind": "code", **code}
        for i in range(2)
    ]
    problem = {"messages": user("1 + 1?") + assistant("The answer is 2."), "kind": "reasoning", **rule}
    write_split(run / "data" / "pretrain", [{"text": small_model.TEXT * n, "kind": "facts"} for n in (1, 2, 3)])
    write_split(run / "data" / "sft", [*questions, *functions, problem])
    write_split(
        run / "data" / "reasoning",
        [
            {"prompt": user(f"{i} + 1?"), "answer": str(i + 1), "kind": kind}
            for i, kind in enumerate(["arithmetic", "logic", "logic"])
        ],
    )
    write_split(
        run / "data" / "preferences",
        [{"prompt": user(f"And {i}?"), "kind": "question", **rule} for i in range(4)],
    )


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    write_data(run)
    small_model.save_model(run / "0_random", seed=0)
    return run


def evaluate(run, stage, *options):
    assert main(["evaluate", str(run), "--stage", stage, "--max_new_tokens", "6", "--samples", "2", *options]) == 0
    result = json.loads((run / "evaluations" / f"{stage}.json").read_text(), parse_constant=pytest.fail)
    lines = (run / "evaluations" / f"{stage}.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def test_all_metrics_are_measured(run, capsys):
    small_model.save_model(run / "2_sft", seed=1)
    result, examples = evaluate(run, "0_random")
    metrics = result["metrics"]
    expected = {"bits_per_byte", "instruction_accuracy", "stop_rate", "mean_length", "pass@1", "step_rate"}
    expected |= {"reasoning_length", "pass@1_sampled", "pass@2", "maj@2", "win_rate", "win_rate_greedy"}
    assert set(metrics) == expected | {"last_sentence_share", "last_sentence_share_greedy"}
    assert result["texts"] == {}, "baselines are measured with the opponent only"
    for name, entry in metrics.items():
        assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1], name
        ids = [example["id"] for example in examples if example["metric"] == name]
        assert len(ids) == len(set(ids)) == entry["n"], name
    assert set(metrics["instruction_accuracy"]["by_kind"]) == {"question", "code"}
    assert set(metrics["pass@1"]["by_kind"]) == {"arithmetic", "logic"}
    assert [answer["prompt"] for answer in result["answers"]] == list(FIXED_PROMPTS)
    assert result["answers"][0]["prompt"] == "What is an LLM?"
    assert [(trace["kind"], trace["problem"]) for trace in result["traces"]] == [
        ("arithmetic", "0 + 1?"),
        ("logic", "1 + 1?"),
    ]
    assert "instruction_accuracy" in capsys.readouterr().out


def test_bits_per_byte_follow_from_the_examples(run):
    result, examples = evaluate(run, "0_random")
    documents = [example for example in examples if example["metric"] == "bits_per_byte"]
    assert [document["weight"] for document in documents] == [len(small_model.TEXT) * n for n in (1, 2, 3)]
    total = sum(document["value"] * document["weight"] for document in documents)
    weight = sum(document["weight"] for document in documents)
    assert result["metrics"]["bits_per_byte"]["value"] == pytest.approx(total / weight)


def test_the_same_evaluation_twice_gives_the_same_files(run):
    small_model.save_model(run / "2_sft", seed=1)
    first, examples = evaluate(run, "0_random", "--seed", "5")
    second, again = evaluate(run, "0_random", "--seed", "5")
    assert {**first, "seconds": 0} == {**second, "seconds": 0} and examples == again


def test_without_an_opponent_there_is_no_win_rate(run):
    result, _ = evaluate(run, "0_random")
    assert "win_rate" not in result["metrics"] and "pass@1" in result["metrics"]


def test_a_model_against_itself_ties_where_it_is_greedy_and_not_where_it_samples(run):
    small_model.save_model(run / "2_sft", seed=1)
    result, examples = evaluate(run, "2_sft")
    greedy = [example for example in examples if example["metric"] == "win_rate_greedy"]
    assert all(example["answer"] == example["opponent"] and example["value"] == 0.5 for example in greedy)
    sampled = [example for example in examples if example["metric"] == "win_rate"]
    assert all(example["answer"] != example["opponent"] for example in sampled)
    # The outcome of a prompt is the mean of four matches, and the prompts are counted.
    assert all(len(example["answers"]) == len(example["opponents"]) == SAMPLES for example in sampled)
    assert result["metrics"]["win_rate"]["n"] == len(sampled) == 4
    _, others = evaluate(run, "0_random")
    # All stages are compared with the same answers.
    for metric in ("win_rate", "win_rate_greedy"):
        assert [e["opponent"] for e in others if e["metric"] == metric] == [
            e["opponent"] for e in examples if e["metric"] == metric
        ]


def test_the_opponents_answers_are_used_again_unless_something_that_they_depend_on_has_changed(run):
    small_model.save_model(run / "2_sft", seed=1)

    def opponents(*options):
        return [e["opponent"] for e in evaluate(run, "0_random", *options)[1] if e["metric"].startswith("win_rate")]

    made, other_seed = opponents(), opponents("--seed", "5")
    evaluate(run, "2_sft")
    assert opponents() == made
    path = run / "evaluations" / "2_sft.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"opponent": "saved"} | ({"opponents": ["saved"] * SAMPLES} if "opponents" in line else {})
    write_rows(path, lines)
    assert set(opponents()) == {"saved"}
    assert opponents("--seed", "5") == other_seed
    assert "saved" not in opponents("--max_new_tokens", "5")
    path.unlink()
    assert opponents() == made, "answers that are missing are sampled again"
    small_model.save_model(run / "2_sft", seed=2)
    assert len(changed := opponents()) == len(made) and changed != made and "saved" not in changed


@pytest.mark.parametrize(("stage", "follows"), [("0_random", False), ("3_ppo", True), ("10_grpo", True)])
def test_the_divergence_from_the_opponent_is_measured_for_the_stages_that_follow_it(run, stage, follows):
    small_model.save_model(run / "2_sft", seed=1)
    small_model.save_model(run / stage, seed=0)
    result, _ = evaluate(run, stage)
    assert ("kl" in result["metrics"]) is follows


def test_longer_problems_are_a_metric_of_their_own(run):
    without, _ = evaluate(run, "0_random")
    rows = [{"prompt": user(f"{i} + 1 + 1 + 1?"), "answer": str(i), "kind": "arithmetic"} for i in range(5)]
    write_split(run / "data" / "reasoning", rows, "test_longer")
    result, examples = evaluate(run, "0_random")
    assert result["metrics"]["pass@1_longer"]["n"] == 5 and "pass@1_longer" not in without["metrics"]
    assert result["metrics"]["pass@1"] == without["metrics"]["pass@1"]
    assert sum(example["metric"] == "pass@1_longer" for example in examples) == 5


def write_training_data(run):
    """Write what the baselines need: training problems and validation prompts."""
    problems = [("logic", "1"), ("logic", "2"), ("logic", "2"), ("arithmetic", "1"), ("arithmetic", "3")]
    rows = [{"prompt": user("1 + 1?"), "answer": answer, "kind": kind} for kind, answer in problems]
    write_split(run / "data" / "reasoning", rows, "train")
    rule = {"require": [["cat"]], "reject": [], "max_words": 0, "test": ""}
    prompts = [{"prompt": user(f"So {i}?"), "kind": "question", **rule} for i in range(3)]
    write_split(run / "data" / "preferences", prompts, "validation")


def test_the_baselines_are_measured_beside_the_opponent(run):
    small_model.save_model(run / "2_sft", seed=1)
    write_training_data(run)
    result, examples = evaluate(run, "2_sft")
    names = {"elicited/pass@1", "majority/pass@1", "constant/win_rate", "constant/win_rate_greedy"}
    assert {name for name in result["metrics"] if "/" in name} == names
    of = {name: [e for e in examples if e["metric"] == name] for name in (*names, "pass@1", "win_rate_greedy")}
    # They answer the same rows, so that differences can be paired.
    for name in names:
        whole = of["pass@1" if "pass" in name else "win_rate_greedy"]
        assert [(e["id"], e["kind"]) for e in of[name]] == [(e["id"], e["kind"]) for e in whole]
    assert all(example["answer"].startswith("Working:") for example in of["elicited/pass@1"])
    # The test problems are "0 + 1?", of arithmetic, and "1 + 1?" and "2 + 1?", of logic.
    assert [(e["answer"], e["value"]) for e in of["majority/pass@1"]] == [
        ("The answer is 1.", 1.0),
        ("The answer is 2.", 1.0),
        ("The answer is 2.", 0.0),
    ]
    text = result["texts"]["constant"]["text_greedy"]
    pairs = [(e["answer"], text.replace("…", e["opponent"])) for e in of["constant/win_rate_greedy"]]
    assert all(answer == glued for answer, glued in pairs)
    assert result["texts"]["elicited"] == {"text": "Working:"}
    assert not any("/" in name for name in evaluate(run, "0_random")[0]["metrics"])


@pytest.mark.parametrize(
    ("removed", "absent"),
    [
        ("reasoning/test.parquet", {"elicited", "majority"}),
        ("reasoning/train.parquet", {"majority"}),
        ("preferences/validation.parquet", {"constant"}),
    ],
)
def test_a_baseline_without_its_data_is_absent(run, removed, absent):
    small_model.save_model(run / "2_sft", seed=1)
    write_training_data(run)
    (run / "data" / removed).unlink()
    result, _ = evaluate(run, "2_sft")
    present = {name.split("/")[0] for name in result["metrics"] if "/" in name}
    assert present == {"elicited", "constant", "majority"} - absent
    assert set(result["texts"]) == present - {"majority"}


def test_limit_bounds_the_number_of_examples(run):
    result, _ = evaluate(run, "0_random", "--limit", "2")
    assert result["metrics"]["instruction_accuracy"]["n"] == 2
    assert result["metrics"]["bits_per_byte"]["n"] == 2


def test_a_subsample_contains_every_kind():
    alternating = [{"kind": "ab"[i % 2]} for i in range(100)]
    sorted_by_kind = [{"kind": "ab"[i // 50]} for i in range(100)]
    for rows in (alternating, sorted_by_kind):
        chosen = subsample(rows, 20)
        assert len(chosen) == 20 and {row["kind"] for row in chosen} == {"a", "b"}
        assert chosen == subsample(rows, 20)


def test_the_users_own_data_are_measured(run, tmp_path):
    problems = [{"question": f"{i} + 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"} for i in range(3)]
    gsm8k = write_rows(tmp_path / "gsm8k.jsonl", problems)
    text = small_model.write_text(tmp_path / "text.txt", lines=130)
    result, _ = evaluate(
        run,
        "0_random",
        "--text",
        text,
        "--problems",
        gsm8k,
        "--prompt_column",
        "question",
        "--answer_pattern",
        "#### (.+)",
    )
    assert result["metrics"]["pass@1"]["n"] == 3
    assert result["traces"][0]["reference"] == "2"
    assert result["metrics"]["bits_per_byte"]["n"] == len(open_source(text)["train"])


def test_an_adapter_is_evaluated_with_its_base(run):
    base = AutoModelForCausalLM.from_pretrained(run / "0_random")
    adapter = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    get_peft_model(base, adapter).save_pretrained(run / "2_sft")
    small_model.save_tokenizer(run / "2_sft")
    adapted, _ = evaluate(run, "2_sft", "--limit", "2")
    plain, _ = evaluate(run, "0_random", "--limit", "2")
    assert adapted["metrics"]["bits_per_byte"]["value"] != plain["metrics"]["bits_per_byte"]["value"]


def write_reward_model(run):
    tokenizer = small_model.tokenizer()
    small_model.save_model(run / "3_reward")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(run / "3_reward", num_labels=1)
    config.architectures = None
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(run / "3_reward")
    return model.eval(), tokenizer


def test_a_reward_model_is_measured_on_pairs(run):
    model, tokenizer = write_reward_model(run)
    pairs = [
        {
            "prompt": user(f"Question {i}?"),
            "chosen": assistant("A cat. " * (i % 3 + 1)),
            "rejected": assistant(f"No {i}."),
            "kind": "question",
            # The annotators are indifferent about the first pair.
            "taste_chosen": float(i % 2) if i else 0.4,
            "taste_rejected": 0.5,
        }
        for i in range(8)
    ]
    write_split(run / "3_preferences", pairs)
    result, examples = evaluate(run, "3_reward")
    metrics = result["metrics"]
    alone = []
    for pair in pairs:
        both = []
        for side in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template([*pair["prompt"], *pair[side]], return_dict=False)
            with torch.no_grad():
                both.append(model(torch.tensor([ids])).logits[0, 0].item())
        alone.append(both[0] - both[1])
    assert metrics["reward_accuracy"]["value"] == sum(margin > 0 for margin in alone) / 8
    assert metrics["reward_margin"]["value"] == pytest.approx(sum(alone) / 8, abs=1e-5)
    noise_free = [(margin > 0) == (i % 2 == 1) for i, margin in enumerate(alone) if i]
    assert metrics["reward_accuracy_noise_free"]["value"] == sum(noise_free) / 7
    assert -1 <= metrics["reward_length_correlation"]["value"] <= 1
    assert 0 <= metrics["reward_calibration_error"]["value"] <= 1
    assert {example["metric"] for example in examples} == {"reward_accuracy", "reward_accuracy_noise_free"}
    assert result["answers"] == []


def test_a_reward_model_cannot_be_the_opponent(run, capsys):
    write_reward_model(run)
    message = refused(capsys, "evaluate", run, "--stage", "0_random", "--against", "3_reward")
    assert "3_reward: is a reward model" in message


def test_an_adapter_of_a_reward_model_is_measured_as_the_two_together(run):
    write_split(run / "3_preferences", text_pairs())
    small_model.save_model(run / "base")
    base = LlamaForSequenceClassification.from_pretrained(run / "base", num_labels=1)
    adapter = LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(base, adapter)
    adapted.save_pretrained(run / "3_reward")
    small_model.save_tokenizer(run / "3_reward")
    measured, _ = evaluate(run, "3_reward")
    shutil.rmtree(run / "3_reward")
    adapted.merge_and_unload().save_pretrained(run / "3_reward")
    small_model.save_tokenizer(run / "3_reward")
    merged, _ = evaluate(run, "3_reward")
    for metric in ("reward_margin", "reward_length_correlation"):
        assert measured["metrics"][metric]["value"] == pytest.approx(merged["metrics"][metric]["value"], abs=1e-5)


def text_pairs():
    """Return pairs as people might supply them: text, with the required columns only."""
    return [{"prompt": f"Question {i}?", "chosen": "A cat. " * (i % 3 + 1), "rejected": f"No {i}."} for i in range(8)]


def test_pairs_in_any_format_measure_the_same(run):
    write_reward_model(run)
    write_split(run / "3_preferences", text_pairs())
    text, _ = evaluate(run, "3_reward")
    conversations = [
        {
            "chosen": user(row["prompt"]) + assistant(row["chosen"]),
            "rejected": user(row["prompt"]) + assistant(row["rejected"]),
            "kind": None if i else "question",
        }
        for i, row in enumerate(text_pairs())
    ]
    same = {"chosen": conversations[0]["chosen"], "rejected": conversations[0]["chosen"], "kind": "question"}
    shutil.rmtree(run / "3_preferences")
    write_split(run / "3_preferences", [*conversations, same])
    implicit, _ = evaluate(run, "3_reward")
    assert implicit["metrics"]["reward_accuracy"]["n"] == 8
    for metric, measured in text["metrics"].items():
        assert implicit["metrics"][metric]["value"] == measured["value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere", "--stage", "2_sft"], "RUN: nowhere: no such directory; make it with"),
        (
            ["RUN", "--stage", "0_random", "--text", "nowhere/text.txt"],
            "--text: nowhere/text.txt: there is no",
        ),
        (["RUN", "--stage", "5_more"], "--stage: 5_more: is not the directory of a model; choose from: 0_random"),
        (["RUN", "--stage", "../RUN/0_random"], "--stage: ../RUN/0_random: is not the directory of a model"),
        (["RUN", "--stage", "0_random", "--against", "5_more"], "--against: 5_more: is not the directory of a model"),
        (["RUN", "--stage", ".."], "--stage: ..: is not the directory of a model"),
        (["RUN", "--stage", "."], "--stage: .: is not the directory of a model"),
        (
            ["RUN", "--stage", "0_random", "--max_new_tokens", "999"],
            "--max_new_tokens: 999: the model's context is 256 tokens",
        ),
        (["RUN", "--stage", ""], "--stage: '': is empty"),
        (["RUN", "--stage", "0_random", "--samples", "100000000"], "--samples: 100000000: must be at most 1000"),
        (["RUN", "--stage", "0_random", "--samples", "-1"], "--samples: -1: must be a number of at least 1"),
        (["RUN", "--stage", "0_random", "--limit", "0"], "--limit: 0: must be a number of at least 1"),
        (["RUN", "--stage", "0_random", "--samples", "0"], "--samples: 0: must be a number of at least 1"),
        (
            ["RUN", "--stage", "0_random", "--problems", "DATA/preferences/test.parquet"],
            "--answer_column: answer: does not exist; choose from:",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(run, capsys, options, message):
    folder = str(run) if options[0] == "RUN" else options[0]
    options = [option.replace("DATA", f"{run}/data") for option in options[1:]]
    error = refused(capsys, "evaluate", folder, *options)
    lines = [line for line in error.splitlines() if line and "examples/s" not in line and "Loading" not in line]
    assert len(lines) == 1 and lines[0].startswith(message)


def refusal(capsys, run, *options):
    """Return the one line that `evaluate` of 0_random ends with."""
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", str(run), "--stage", "0_random", *options])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith(("--", "RUN", *HELD_OUT))]
    assert not (run / "evaluations").is_dir() and "bits_per_byte" not in captured.out
    return line


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_model_without_one_of_its_weights_is_refused(run, capsys):
    change_weights(run / "0_random", lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    line = refusal(capsys, run)
    assert line.startswith("--stage: ") and "lacks the weights model.layers.0.mlp.up_proj.weight" in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverged_is_refused(run, capsys, value):
    change_weights(run / "0_random", lambda weights: weights["model.norm.weight"].fill_(value))
    assert "not finite numbers (model.norm.weight)" in refusal(capsys, run)


def test_an_opponent_that_diverged_is_refused(run, capsys):
    small_model.save_model(run / "2_sft", seed=1)
    change_weights(run / "2_sft", lambda weights: weights["model.norm.weight"].fill_(math.nan))
    line = refusal(capsys, run)
    assert line.startswith("--against: ") and "not finite numbers" in line


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(run, capsys):
    tokenizer = small_model.tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(run / "0_random")
    assert "its tokenizer" in refusal(capsys, run)


def test_a_reward_model_is_checked_even_without_pairs(run, capsys):
    write_reward_model(run)
    weights = load_file(run / "3_reward" / "model.safetensors")
    weights["score.weight"].fill_(math.nan)
    save_file(weights, run / "3_reward" / "model.safetensors", {"format": "pt"})
    assert "not finite numbers (score.weight)" in refusal(capsys, run, "--stage", "3_reward")


def test_a_file_in_the_place_of_the_evaluations_is_refused(run, capsys):
    (run / "evaluations").write_text("")
    assert "evaluations: is not a directory" in refusal(capsys, run)


def test_a_run_that_cannot_be_written_to_is_refused(run, capsys, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    line = refusal(capsys, run)
    assert line.startswith("RUN: ") and "no permission to write" in line


def test_data_without_a_column_are_refused(run, capsys):
    shutil.rmtree(run / "data" / "pretrain")
    write_split(run / "data" / "pretrain", [{"story": "A cat."}])
    assert "text: there is no such column; choose from: story" in refusal(capsys, run)


def test_documents_without_words_are_left_out(run):
    path = run / "data" / "pretrain" / "test.parquet"
    rows = pq.read_table(path).to_pylist()
    write_split(path.parent, [*rows, {"text": " \n", "kind": "facts"}, {"text": "", "kind": "facts"}])
    assert evaluate(run, "0_random")[0]["metrics"]["bits_per_byte"]["n"] == len(rows)


def test_damaged_data_are_refused(run, capsys):
    (run / "data" / "pretrain" / "test.parquet").write_bytes(b"PAR1")
    error = refused(capsys, "evaluate", run, "--stage", "0_random")
    assert "test.parquet: cannot be read" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("split", "changes", "said"),
    [
        ("pretrain", {"text": None}, "text is None"),
        ("sft", {"messages": None}, "messages is None"),
        ("sft", {"messages": user("Alone?")}, "ends with the role user"),
        ("sft", {"messages": [{"role": "robot", "content": "?"}]}, "role 'robot'"),
        ("sft", {"require": ["cat"]}, "require is ['cat'], not a list of lists"),
        ("sft", {"reject": "dog"}, "reject is 'dog'"),
        ("sft", {"max_words": "nine"}, "max_words is 'nine'"),
        ("reasoning", {"prompt": None}, "prompt is None"),
        ("reasoning", {"answer": None}, "answer is None"),
        ("preferences", {"prompt": assistant("No question.")}, "ends with the role assistant"),
        ("preferences", {"test": 5}, "test is 5"),
    ],
)
def test_a_row_that_cannot_be_measured_is_refused(run, capsys, split, changes, said):
    path = run / "data" / split / "test.parquet"
    row = {**pq.read_table(path).to_pylist()[0], **changes}
    pq.write_table(pa.Table.from_pylist([row]), path)
    line = refusal(capsys, run)
    assert f": dataset_name: {path}, row 0: " in line and said in line
