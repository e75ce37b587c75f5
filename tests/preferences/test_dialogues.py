"""Preferences between dialogues with tools, and what the stages behind them make of these rows."""

import copy
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import DPOConfig, KTOConfig, ModelConfig, RewardConfig, SFTConfig

from pipeline.__main__ import main
from pipeline.config.parser import parse
from pipeline.data.arguments import DataArguments
from pipeline.data.messages import Messages, labelled_pair
from pipeline.errors import UserError
from pipeline.models.tokenizer import special_tokens
from pipeline.preferences.collect import PreferenceArguments, _as_json, collect, write
from pipeline.preferences.judges import load_judge, score
from pipeline.preferences.labels import Counts
from pipeline.preferences.people import VoteArguments
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.rl.rewards import RewardModel
from pipeline.training.inputs import load_inputs
from tests.helpers import small_model
from tests.helpers import tool_toy as toy
from tests.helpers.files import write_rows
from tests.helpers.sampling_recipes import run, write_config

TEXTS = [" ".join(words) for words in itertools.product(["1", "2", "4", "x"], repeat=3)]
TOKENIZER = toy.tokenizer()
CALL = {"type": "function", "function": {"name": "double", "arguments": {"n": 2}}}


def inputs(folder: Path) -> dict[str, Any]:
    """Save a policy that calls a tool, and prompts; return the arguments that name them."""
    for part in (toy.policy(), TOKENIZER):
        part.save_pretrained(folder / "caller")
    rows = ({"prompt": [{"role": "user", "content": text}], "most": 1} for text in TEXTS)
    write_rows(folder / "prompts.jsonl", rows)
    return {
        "model_name_or_path": str(folder / "caller"),
        "dataset_name": str(folder / "prompts.jsonl"),
        "judge": "tests.helpers.tool_toy:says_yes",
        "max_new_tokens": 24,
        "samples_per_prompt": 4,
        "batch_size": 32,
    }


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def collected(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("collected") / "3_preferences"
    collect(PreferenceArguments(**arguments, tools=["tests.helpers.tool_toy:double"], output_dir=str(output)))
    return output


def contents(folder: Path) -> dict[str, list[Any]]:
    """Read a data set without the cache, in which datasets does not notice that a folder was replaced."""
    with tempfile.TemporaryDirectory() as cache:
        return {name: list(split) for name, split in load_dataset(str(folder), cache_dir=cache).items()}


def answers(rows: list[Any]) -> list[Messages]:
    return [row[side] for row in rows for side in ("chosen", "rejected")]


def training(config: Any, folder: Path, **changes: Any) -> Any:
    return config(str(folder / "output"), use_cpu=True, bf16=False, report_to="none", max_length=64, **changes)


def test_answers_are_dialogues_and_are_judged_as_rewards_judge_them(collected: Path) -> None:
    splits = contents(collected)
    assert set(splits) == {"train", "validation"}
    for row in itertools.chain(*splits.values()):
        chosen, rejected = toy.says_yes([row["chosen"], row["rejected"]])
        assert chosen > rejected and row["annotator"] == "judge"
        (schema,) = json.loads(row["tools"])
        assert schema["function"]["name"] == "double"
    openings = set()
    results = []
    for answer in answers(splits["train"]):
        openings.add(tuple(message["role"] for message in answer[:3]))
        assert answer[0]["role"] == answer[-1]["role"] == "assistant"
        for message, result in itertools.pairwise(answer):
            if result["role"] == "tool":
                results.append(result["content"])
                (call,) = message["tool_calls"]
                assert result["name"] == call["function"]["name"]
                if "error" not in result["content"]:
                    assert call["function"]["arguments"].get("n") in (1, 2)
                    assert result["content"] in ("2", "4")
    assert openings >= {("assistant",), ("assistant", "tool", "assistant")}, "answers with and without a call"
    assert any("error" in result for result in results), "a call may fail"


def test_sampling_again_and_on_two_processes_gives_the_same_rows(
    collected: Path, arguments: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "3_preferences.yaml"
    fields = {**arguments, "tools": ["tests.helpers.tool_toy:double"]}
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))
    for processes in (1, 2):
        output = tmp_path / str(processes)
        done = run("recipes.preferences", "--config", str(config), "--output_dir", str(output), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert contents(output) == contents(collected)
    for wrong, said in (
        (["--tools", "calculater"], "tools: calculater: did you mean calculator?"),
        (
            ["--environment", "tests.helpers.tool_toy:double"],
            "environment: tests.helpers.tool_toy:double: must be a class",
        ),
    ):
        done = run("recipes.preferences", "--config", str(config), "--output_dir", str(tmp_path / "no"), *wrong)
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "no").exists(), done.stderr[-3000:]


def test_an_environment_writes_into_the_prompt_and_bounds_calls(arguments: dict[str, Any], tmp_path: Path) -> None:
    given = {**arguments, "environment": "tests.helpers.tool_toy:Counter", "output_dir": str(tmp_path / "out")}
    collect(PreferenceArguments(**given, max_tool_calling_iterations=2))
    rows = contents(tmp_path / "out")["train"]
    assert {row["prompt"][-1]["content"] for row in rows} <= {f"{text} yes" for text in TEXTS}
    results = [[one["content"] for one in answer if one["role"] == "tool"] for answer in answers(rows)]
    assert max(map(len, results)) == 2, "results are returned twice at most"
    second = [found[1] for found in results if len(found) == 2 and found[0] in ("2", "4")]
    assert second and all("error" in one for one in second), "each answer has an object of its own, asked once"


def test_a_model_whose_template_does_not_write_calls_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    small_model.save_model(tmp_path / "model")
    words = copy.deepcopy(small_model.tokenizer())
    words.chat_template = words.chat_template.replace("message['tool_calls']", "[]")
    words.save_pretrained(tmp_path / "model")
    given = {**arguments, "model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"tools: .*calculator.*: the model's chat template does not support"):
        collect(PreferenceArguments(**given, tools=["calculator"]))
    assert not (tmp_path / "out").exists()


def test_people_compare_single_answers() -> None:
    with pytest.raises(UserError, match="tools: d: unknown field"):
        parse(
            VoteArguments,
            argv=["--model_name_or_path", "a", "--dataset_name", "b", "--output_dir", "c", "--tools", "d"],
        )


def test_a_reward_model_judges_the_whole_dialogue(tmp_path: Path) -> None:
    reward_model().save_pretrained(tmp_path / "judge")
    TOKENIZER.save_pretrained(tmp_path / "judge")
    dialogue = [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "double", "content": "4"},
        {"role": "assistant", "content": "yes"},
    ]
    last_turn = dialogue[2:]
    prompt = [{"role": "user", "content": "1"}]
    row = {"prompt": prompt}
    judge = load_judge(str(tmp_path / "judge"))
    score_of_dialogue, score_of_last_turn = score(reward_model(), TOKENIZER, [prompt + dialogue, prompt + last_turn])
    assert score_of_dialogue != score_of_last_turn
    share_won = float(score_of_dialogue > score_of_last_turn)
    # The second match is between equal dialogues: a draw.
    assert judge.match([dialogue, dialogue], [last_turn, dialogue], [row, row]) == [share_won, 0.5]


# ---- What later stages read


def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(toy.VOCABULARY), num_labels=1, pad_token_id=0, eos_token_id=2, **sizes)
    return LlamaForSequenceClassification(config).eval()


def reward_inputs(
    model: str, pairs: list[tuple[Messages, Messages]], data: Path, tokenizer: Any = TOKENIZER
) -> list[list[int]]:
    """Write answers to prompts as a data set, and return the tokens that a reward model is trained on."""
    rows = []
    for prompt, answer in pairs:
        read = json.loads(_as_json(tokenizer, answer, special_tokens(tokenizer)))
        other = [{"role": "assistant", "content": "nothing"}]
        rows.append({**labelled_pair(prompt, read, other, "judge", True), "tools": "[]"})
    write(data, {"train": rows}, {"train": Counts()}, "a", "b")
    args = training(RewardConfig, data.with_name("reward"), eval_strategy="no")
    args.max_length = None
    _, train, _ = load_inputs("preference", DataArguments(str(data), validation_share=0.0), args, ModelConfig(model))
    return [row["chosen_ids"] for row in train]


def test_a_reward_model_is_trained_on_the_tokens_that_ppo_scores(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, on dialogues that PPO itself samples; of one that was cut off, without the end of its turn."""
    scored: list[tuple[Messages, bool]] = []
    tokens: list[list[int]] = []
    render = RewardModel.render

    def recorded(self: RewardModel, messages: Messages, ended: bool) -> str:
        text = render(self, messages, ended)
        scored.append((messages, ended))
        tokens.append(self.tokenizer(text=[text], add_special_tokens=False)["input_ids"][0])
        return text

    monkeypatch.setattr(RewardModel, "render", recorded)
    config = PPOConfig(
        str(tmp_path / "ppo"), per_device_train_batch_size=64, max_completion_length=22, use_cpu=True, bf16=False,
        report_to="none", num_generations=1, activation_checkpointing=False,
    )  # fmt: skip
    trainer = PPOTrainer(
        model=toy.policy(), reward_funcs=[reward_model()], reward_processing_classes=[toy.tokenizer()], args=config,
        train_dataset=toy.prompts(64), processing_class=toy.tokenizer(), tools=[toy.double],
    )  # fmt: skip
    trainer.model.train()
    trainer._generate_and_score_completions([dict(row) for row in trainer.train_dataset])
    assert len(scored) == 64 and 0 < sum(ended for _, ended in scored) < 64

    pairs = [(messages[:1], messages[1:]) for messages, _ in scored]
    # What says nothing is no answer, and what ends with a result for which the model had no room left, neither.
    kept = [place for place, (_, answer) in enumerate(pairs) if _as_json(TOKENIZER, answer, special_tokens(TOKENIZER))]
    assert len(kept) > 40
    model = arguments["model_name_or_path"]
    trained_on = reward_inputs(model, [pairs[place] for place in kept], tmp_path / "pairs")
    assert len(trained_on) == len(kept)
    compared = 0
    for place, ids in zip(kept, trained_on, strict=True):
        assert ids[: len(tokens[place])] == tokens[place]
        if scored[place][1]:
            assert ids == tokens[place]
            compared += any(one["role"] == "tool" for one in scored[place][0])
    assert compared > 20


HARD_ARGUMENTS = [
    {"n": 0.1234, "m": [1, {"b": 2.5e-07}]},
    {"n": 10**30, "m": -(2**63)},
    {"n": "é\u2028 \\ \"' </s> 0.10", "m": True},
    {"z": 1, "a": 2},
    {"n": 0.12345678901234566, "m": 123456789.12345679},
]


@pytest.mark.parametrize("arguments_of_call", HARD_ARGUMENTS, ids=str)
def test_no_argument_of_a_call_changes_between_the_answer_and_training(
    tmp_path: Path, arguments_of_call: dict[str, Any]
) -> None:
    """JSON or Arrow could round such numbers or reorder such keys; training would then see other tokens than PPO."""
    call = {"type": "function", "function": {"name": "double", "arguments": arguments_of_call}}
    answer = [
        {"role": "assistant", "content": " yes ", "tool_calls": [call, CALL]},
        {"role": "tool", "name": "double", "content": " 4\n"},
        {"role": "tool", "name": "double", "content": ""},
        {"role": "assistant", "content": "yes\n\n", "reasoning_content": "x"},
    ]
    prompt = [{"role": "user", "content": "1"}]
    words = small_model.tokenizer()
    model = small_model.save_model(tmp_path / "model")
    (trained_on,) = reward_inputs(model, [(prompt, answer)], tmp_path / "pairs", words)
    text = RewardModel(reward_model(), words, [words.eos_token_id], {}).render([*prompt, *answer], ended=True)
    assert trained_on == words(text, add_special_tokens=False)["input_ids"], "PPO scores the same tokens"
    (row,) = contents(tmp_path / "pairs")["train"]
    assert row["chosen"] == answer, "TRL reads the same messages"


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [{"role": "assistant", "content": " "}],
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}],
        [{"role": "assistant", "content": "4<|end|>"}],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a", "arguments": {"b": None}}}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a", "arguments": "b"}}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a", "arguments": {"b": 1e999}}}]}],
    ],
    ids=["nothing", "blank", "no room", "special token", "null", "no arguments", "infinite"],
)
def test_an_answer_that_a_row_cannot_hold_is_dropped(answer: Messages) -> None:
    assert _as_json(TOKENIZER, answer, special_tokens(TOKENIZER)) == ""


def test_sft_on_preferred_dialogues_learns_calls_and_not_results(
    collected: Path, arguments: dict[str, Any], tmp_path: Path
) -> None:
    args = training(SFTConfig, tmp_path, assistant_only_loss=True)
    data = DataArguments(str(collected), completion_column="chosen")
    _, train, _ = load_inputs("conversation", data, args, ModelConfig(arguments["model_name_or_path"]))
    results = 0
    for row in train:
        of_tool = False
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            word = TOKENIZER.convert_ids_to_tokens(token)
            of_tool = (of_tool or word == "<|tool|>") and word != "<|assistant|>"
            results += of_tool
            assert not of_tool or label == -100
        turns = "".join(TOKENIZER.convert_ids_to_tokens([label for label in row["labels"] if label != -100]))
        assert turns.count("<|end|>") == sum(one["role"] == "assistant" for one in row["messages"])
        assert turns.count("<|call|>") == sum(len(one.get("tool_calls") or ()) for one in row["messages"])
    assert results > 10


@pytest.mark.parametrize(
    ("config", "kind", "streamed"),
    [(DPOConfig, "preference", False), (DPOConfig, "preference", True), (KTOConfig, "unpaired", False)],
)
def test_dpo_and_kto_refuse_dialogues(
    collected: Path, arguments: dict[str, Any], tmp_path: Path, config: Any, kind: Any, streamed: bool
) -> None:
    steps = {"max_steps": 1} if streamed else {}
    data = DataArguments(str(collected), dataset_streaming=streamed)
    with pytest.raises(UserError, match="dataset_name: dialogues with tools: DPO and KTO would also learn what tools"):
        load_inputs(kind, data, training(config, tmp_path, **steps), ModelConfig(arguments["model_name_or_path"]))


def test_a_reward_model_of_dialogues_is_trained_and_ppo_with_the_same_tools_scores_by_it(
    collected: Path, arguments: dict[str, Any], tmp_path: Path
) -> None:
    options = {"dataset_name": str(collected), "max_length": 64, "bf16": False, "report_to": "none", "max_steps": 30}
    options |= {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "logging_steps": 5}
    config = tmp_path / "3_reward.yaml"
    fields = {**options, "model_name_or_path": arguments["model_name_or_path"]}
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))
    done = run("recipes.reward", "--config", str(config), "--output_dir", str(tmp_path / "3_reward"))
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "3_reward" / "trainer_state.json").read_text())["log_history"]
    assert [entry["accuracy"] for entry in log if "accuracy" in entry][-1] > 0.6

    changes: dict[str, Any] = {
        "model_name_or_path": arguments["model_name_or_path"],
        "dataset_name": arguments["dataset_name"],
        "reward_model_path": str(tmp_path / "3_reward"),
        "reward_funcs": ["tests.helpers.tool_toy:says_yes"],
        "reward_weights": [1.0, 0.0],
        "tools": ["tests.helpers.tool_toy:double"],
        "max_completion_length": 24,
        "max_steps": 2,
    }
    command = write_config("ppo", tmp_path, **changes)
    done = run("recipes.ppo", *command, "--output_dir", str(tmp_path / "3_ppo"))
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "3_ppo" / "trainer_state.json").read_text())["log_history"]
    assert any(entry.get("tools/call_frequency", 0) > 0 for entry in log)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_warm_process")
def test_a_smoke_run_goes_from_dialogues_to_a_reward_model_and_ppo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sampled, trained on, measured and reported."""
    monkeypatch.chdir(tmp_path)
    asked = inputs(tmp_path)
    model = {"model_name_or_path": asked["model_name_or_path"]}
    called = {"tools": ["tests.helpers.tool_toy:double"]}
    trained = {"bf16": False, "report_to": "none"}
    rewarded = {"dataset_name": asked["dataset_name"], "reward_model_path": "runs/mine/3_reward"}
    steps = {
        "3_preferences": {**asked, **called},
        "3_reward": {**model, **trained, "dataset_name": "runs/mine/3_preferences", "max_length": 64},
        "3_ppo": {**model, **trained, **called, **rewarded, "num_generations": 1, "max_completion_length": 24},
        "evaluate": {"judge": asked["judge"], "limit": 4},
    }
    (tmp_path / "mine").mkdir()
    for name, values in steps.items():
        output = {} if name == "evaluate" else {"output_dir": f"runs/mine/{name}"}
        (tmp_path / "mine" / f"{name}.yaml").write_text(json.dumps({**values, **output}))
    assert main(["run", "mine", "--smoke", "--output_dir", "smoke"]) == 0, capfd.readouterr()
    metrics = json.loads((tmp_path / "smoke" / "report" / "metrics.json").read_text())
    assert "reward_accuracy" in metrics["stages"]["3_reward"] and "win_rate" in metrics["stages"]["3_ppo"]
    assert any(
        "tool_calls" in one for row in contents(tmp_path / "smoke" / "3_preferences")["train"] for one in row["chosen"]
    )
