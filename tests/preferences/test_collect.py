"""Collecting preferences: from a model and prompts to a data set that TRL trains on."""

import contextlib
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import DatasetDict, load_dataset
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import RewardConfig, RewardTrainer

from pipeline.config.parser import parse
from pipeline.data.arguments import DataArguments
from pipeline.data.messages import ShapeError, read_answer
from pipeline.data.splits import load_splits
from pipeline.data.votes import VOTES_FILE, read_votes
from pipeline.errors import EXIT_WAITING, RunStopped, UserError
from pipeline.models.generation import Completion
from pipeline.preferences import labels
from pipeline.preferences.collect import PreferenceArguments, collect, encode, label_answers, read_prompts, write
from pipeline.preferences.judges import Judge, compare, load_judge, prefer_column, score
from pipeline.preferences.people import VoteArguments, wait_for_votes
from recipes.worlds.pocket.annotators import PANEL, taste
from tests.helpers.files import write_rows
from tests.helpers.forked import RANKS, run_forked
from tests.helpers.word_model import word_model_config, word_tokenizer

WORDS = ["where", "is", "fox", "owl", "bee", "ant", "forest.", "sea.", "thank", "you.", "obviously."]
PROMPTS = {
    "train": [f"where is {a} {b}" for a in WORDS[2:] for b in WORDS[2:6]],
    "validation": ["is fox", "is owl", "is bee"],
    "test": ["where fox", "where owl", "where bee", "where ant"],
}
CHANCE = "pipeline.preferences.judges:chance"
ROW = {
    "prompt": [],
    "kind": "question",
    "require": [["forest"]],
    "reject": ["sea"],
    "max_words": 0,
    "test": "",
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that answers with a few random words, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    word_tokenizer(WORDS).save_pretrained(path)
    torch.manual_seed(0)
    LlamaForCausalLM(word_model_config(WORDS)).save_pretrained(path)
    return path


def write_prompts(path: Path, prompts: dict[str, list[str]]) -> Path:
    """A data set of prompts with a `preferences` configuration, in Hub layout."""
    for split, texts in prompts.items():
        rows = [{**ROW, "prompt": [{"role": "user", "content": text}]} for text in texts]
        file = path / "preferences" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, rows)
    files = [{"split": split, "path": f"preferences/{split}.jsonl"} for split in prompts]
    card = yaml.safe_dump({"configs": [{"config_name": "preferences", "data_files": files}]})
    (path / "README.md").write_text(f"---\n{card}---\n")
    return path


@pytest.fixture(scope="module")
def prompts_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"), PROMPTS)


@pytest.fixture(scope="module")
def arguments(model_dir: Path, prompts_dir: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(prompts_dir),
        "max_new_tokens": 8,
        "batch_size": 24,
    }


@pytest.fixture(scope="module")
def collected(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("collected") / "3_preferences"
    collect(PreferenceArguments(**arguments, output_dir=str(output_dir)))
    return output_dir


def contents(path: Path) -> dict[str, list[Any]]:
    """Read a data set without the cache, in which datasets does not notice that a folder with a card was replaced."""
    with tempfile.TemporaryDirectory() as cache:
        return {name: split.to_list() for name, split in load_dataset(str(path), cache_dir=cache).items()}


def user_texts(rows: list[Any]) -> set[str]:
    return {row["prompt"][-1]["content"] for row in rows}


def test_the_output_is_a_data_set_in_trls_preference_format(collected: Path) -> None:
    data = load_dataset(str(collected))
    assert isinstance(data, DatasetDict)
    assert list(data) == ["train", "validation", "test"]
    for rows in data.values():
        assert len(rows) > 0
        for row in rows:
            assert [message["role"] for message in row["prompt"]] == ["user"]
            assert [message["role"] for message in row["chosen"]] == ["assistant"]
            assert [message["role"] for message in row["rejected"]] == ["assistant"]
            assert row["chosen"] != row["rejected"]
            assert row["chosen"][0]["content"].strip()
            assert row["rejected"][0]["content"].strip()
            assert row["annotator"] in {annotator.name for annotator in PANEL}
            assert row["first"] in ("chosen", "rejected")
            assert row["kind"] == "question"
    assert set(data["train"]["first"]) == {"chosen", "rejected"}
    assert len(set(data["train"]["annotator"])) == len(PANEL)


def test_prompts_held_out_are_not_sampled_for_training(collected: Path) -> None:
    data = contents(collected)
    for split, texts in PROMPTS.items():
        assert user_texts(data[split]) <= set(texts)


def test_a_prompt_of_two_splits_is_held_out(arguments: dict[str, Any], tmp_path: Path) -> None:
    prompts = {
        "train": ["fox", "owl", "bee", "ant"],
        "validation": ["owl", "ant", "is"],
        "test": ["ant", "bee"],
    }
    given = {
        **arguments,
        "dataset_name": str(write_prompts(tmp_path / "prompts", prompts)),
        "output_dir": "-",
    }
    read = {name: user_texts(rows) for name, rows in read_prompts(PreferenceArguments(**given)).items()}
    assert read == {"train": {"fox"}, "validation": {"owl", "is"}, "test": {"ant", "bee"}}
    # A prompt that is held out, but not used, is not trained on either.
    fewer = PreferenceArguments(**given, max_eval_prompts=2, max_validation_prompts=1)
    assert {name: len(rows) for name, rows in read_prompts(fewer).items()} == {"train": 1, "validation": 1, "test": 2}
    same = PreferenceArguments(**given, max_eval_prompts=1)
    assert {len(rows) for rows in read_prompts(same).values()} == {1}


def test_prompts_without_grading_are_refused_unless_a_judge_is_named(arguments: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"where is {word}"} for word in WORDS[2:] * 4]
    given = {**arguments, "dataset_name": write_rows(tmp_path / "a.jsonl", rows), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"judge: nothing, for .*: 1 of 1 prompts of validation lack the columns"):
        collect(PreferenceArguments(**given, max_eval_prompts=1))
    assert not (tmp_path / "out").exists()
    collect(PreferenceArguments(**given, judge="tests.helpers.own_functions:longer_answers_win"))
    for rows in contents(tmp_path / "out").values():
        for row in rows:
            chosen, rejected = (len(row[side][0]["content"]) for side in ("chosen", "rejected"))
            assert chosen > rejected and row["annotator"] == "judge" and row["taste_chosen"] is None
    assert "compared in pairs by the function tests" in (tmp_path / "out" / "README.md").read_text()


def test_a_single_split_is_divided_by_prompts(arguments: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**ROW, "prompt": f"where is {a} {b}"} for a in WORDS for b in WORDS[:4]]
    given = {**arguments, "dataset_name": write_rows(tmp_path / "a.jsonl", rows), "output_dir": "-"}
    read = {name: user_texts(split) for name, split in read_prompts(PreferenceArguments(**given)).items()}
    assert read["validation"] == {rows[0]["prompt"], rows[20]["prompt"], rows[40]["prompt"]}
    assert read["train"] == {row["prompt"] for row in rows} - read["validation"]


def test_a_reward_model_judges(arguments: dict[str, Any], prompts_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "judge")
    torch.manual_seed(1)
    judge = LlamaForSequenceClassification(word_model_config(WORDS, num_labels=1)).eval()
    judge.save_pretrained(tmp_path / "judge")
    given = {**arguments, "dataset_name": str(prompts_dir), "output_dir": str(tmp_path / "out"), "max_prompts": 4}
    collect(PreferenceArguments(**given, judge=str(tmp_path / "judge")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "judge")
    row = contents(tmp_path / "out")["train"][0]
    scores = []
    for side in ("chosen", "rejected"):
        ids = tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_tensors="pt", return_dict=False)
        with torch.no_grad():
            scores.append(judge(ids).logits.item())
    assert scores[0] > scores[1]
    with pytest.raises(UserError, match=r"judge: .*: is not a reward model"):
        collect(PreferenceArguments(**given, judge=str(model_dir)))


def test_pairs_labelled_by_chance_and_the_preferred_answers_as_conversations(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The control of instruction tuning on preferred answers: the same answers, labelled whatever they say."""
    judge = load_judge(CHANCE)
    answers, others = ([f"{word} {number}" for number in range(400)] for word in ("answer", "another"))
    wins = [win or 0.0 for win in judge.match(answers, others, [ROW] * 400)]
    assert set(wins) == {0.0, 1.0} and 0.4 < statistics.mean(wins) < 0.6
    assert judge.match(others, answers, [ROW] * 400) == [1 - win for win in wins]

    collect(PreferenceArguments(**arguments, judge=CHANCE, output_dir=str(tmp_path / "pairs")))
    args = DataArguments(dataset_name=str(tmp_path / "pairs"), completion_column="chosen")
    train, _ = load_splits(args, "conversation", evaluation=False)
    first = contents(tmp_path / "pairs")["train"][0]
    assert train[0]["messages"] == [*first["prompt"], *first["chosen"]]
    for wrong in (["text", {"role": "assistant", "content": "a"}], [{"role": "assistant"}], [{"role": "user"}], []):
        with pytest.raises(ShapeError):
            read_answer(wrong, "chosen")


def test_a_reward_model_scores_each_answer_once_and_in_batches() -> None:
    torch.manual_seed(1)
    model, words = LlamaForSequenceClassification(word_model_config(WORDS, num_labels=1)), word_tokenizer(WORDS)
    texts = [" ".join(WORDS[i : i + 1 + i % 4]) for i in range(10)]
    conversations = [[{"role": "user", "content": "is"}, {"role": "assistant", "content": text}] for text in texts * 3]
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, inputs: passes.append(len(inputs["input_ids"])), with_kwargs=True)
    scores = score(model, words, conversations, batch_tokens=1000)
    assert passes == [10]
    assert scores == scores[:10] * 3
    passes.clear()
    assert score(model, words, conversations, batch_tokens=20) == pytest.approx(scores, abs=1e-6)
    longest = max(len(words.apply_chat_template(each, return_dict=False)) for each in conversations)
    assert 1 < max(passes) <= 20 // longest + 1 and sum(passes) == 10
    passes[:] = [10]
    model.config.pad_token_id = None
    assert score(model, words, conversations, batch_tokens=1000) == pytest.approx(scores, abs=1e-6)
    assert passes[1:] == [1] * 10, "transformers cannot tell padding"


def test_a_column_of_the_prompts_is_preferred_to_every_sample() -> None:
    prompt = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": prompt, "reply": " Hello. "}, {"prompt": prompt, "reply": "Hello."}]
    answers = [["Bye.", "Hello.", "", "Bye.", "What?"], ["Hello."]]
    labelled, counts = label_answers(rows, answers, pairs_per_prompt=3, judge=prefer_column("reply"))
    pairs = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in labelled}
    assert pairs == {("Hello.", "Bye."), ("Hello.", "What?")}
    assert len(labelled) == counts.pairs == 2 and counts.ties == 0


def test_preferred_column_is_refused_with_a_judge_or_without_answers(tmp_path: Path) -> None:
    options = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": str(tmp_path), "preferred_column": "reply"}
    with pytest.raises(UserError, match="judge: m:judge: the answers in preferred_column are preferred"):
        PreferenceArguments(**options, judge="m:judge")
    judge = prefer_column("reply")
    assert judge.can_judge({"reply": "Hello."}) and not judge.can_judge({"reply": " "}) and not judge.can_judge({})


def test_processes_take_turns_at_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": [{"role": "user", "content": str(i)}]} for i in range(150)]
    answers = [[f"{'a' * (i % 7)}b", "aaa", "aaaaa"] for i in range(150)]
    calls: list[list[str]] = []

    def match(ours: Any, theirs: Any, asked: Any) -> list[float]:
        calls.append([row["prompt"][0]["content"] for row in asked])
        return compare([len(one) for one in ours], [len(one) for one in theirs])

    judge = Judge("a test", match)
    expected = label_answers(rows, answers, pairs_per_prompt=2, judge=judge)
    assert len(calls) == 3 and sum(len(set(asked)) for asked in calls) == 150
    alone, calls = calls, []
    parts: list[Any] = []
    for process in (0, 1):
        monkeypatch.setattr(labels, "PartialState", lambda p=process: SimpleNamespace(num_processes=2, process_index=p))
        monkeypatch.setattr(labels, "gather_object", lambda judged: parts.extend(judged) or parts)
        found = label_answers(rows, answers, pairs_per_prompt=2, judge=judge) if process else None
        if process == 0:
            with contextlib.suppress(ValueError):
                label_answers(rows, answers, pairs_per_prompt=2, judge=judge)
    assert found == expected
    assert sorted(calls) == sorted(alone)


def test_prompts_are_written_with_the_template_arguments_of_the_model(model_dir: Path, tmp_path: Path) -> None:
    words = word_tokenizer(["is", "quick"])
    words.chat_template += "{% if quick %}quick{% endif %}"
    model = SimpleNamespace(config=word_model_config(WORDS))
    prompts = {"train": [{"prompt": [{"role": "user", "content": "is"}]}]}
    (tmp_path / "arguments.json").write_text('{"chat_template_kwargs": {"quick": true}}')
    ends = []
    checkpoint = tmp_path / "checkpoint-5"
    given = (tmp_path, None), (checkpoint, None), (tmp_path, {}), (model_dir, None), (model_dir, '{"quick": true}')
    for folder, template in given:
        args = PreferenceArguments(str(folder), "-", "-", max_new_tokens=8, chat_template_kwargs=template)
        ends.append(words.decode(encode(model, words, prompts, args)["train"][0]).split()[-1])
    assert ends == ["quick", "quick", "<assistant>", "<assistant>", "quick"]
    with pytest.raises(UserError, match=r"chat_template_kwargs: .*: tokenize cannot be given"):
        PreferenceArguments("-", "-", "-", chat_template_kwargs={"tokenize": False})
    with pytest.raises(UserError, match="chat_template_kwargs: quick: is not a JSON object"):
        PreferenceArguments("-", "-", "-", chat_template_kwargs="quick")


def test_a_prompt_that_spells_a_special_token_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts", {"train": ["fox", "owl<end>"]})
    given = {**arguments, "dataset_name": str(prompts), "output_dir": str(tmp_path / "new")}
    with pytest.raises(UserError, match="train, row 1: prompt contains <end>"):
        collect(PreferenceArguments(**given))
    assert not (tmp_path / "new").exists()


def test_an_answer_that_spells_a_special_token_is_dropped(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spelling(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> list[list[Completion]]:
        texts = ("forest.", "forest.<user>why", "sea.")
        return [[Completion(text, [0], True) for text in texts] for _ in prompts]

    monkeypatch.setattr("pipeline.preferences.collect.generate", spelling)
    counts = collect(PreferenceArguments(**{**arguments, "output_dir": str(tmp_path / "new")}))
    assert counts["train"].dropped * 3 == counts["train"].answers
    rows = pq.read_table(tmp_path / "new" / "train.parquet").to_pylist()
    assert {row[side][0]["content"] for row in rows for side in ("chosen", "rejected")} == {"forest.", "sea."}


def test_the_hidden_taste_is_kept_from_what_models_train_on(collected: Path) -> None:
    data = contents(collected)
    for split in ("train", "validation"):
        assert {row["taste_chosen"] for row in data[split]} == {None}
        assert {row["taste_rejected"] for row in data[split]} == {None}
    for row in data["test"]:
        assert row["taste_chosen"] == pytest.approx(taste(row["chosen"][0]["content"], ROW))
        assert row["taste_rejected"] == pytest.approx(taste(row["rejected"][0]["content"], ROW))
    train, _ = load_splits(DataArguments(dataset_name=str(collected)), "preference", evaluation=True)
    assert train.column_names == ["prompt", "chosen", "rejected"]


def test_the_card_counts_what_was_dropped(collected: Path) -> None:
    card = (collected / "README.md").read_text()
    splits = [{"split": split, "path": f"{split}.parquet"} for split in PROMPTS]
    configs = [{"config_name": "default", "data_files": splits}]
    assert DatasetCard(card).data.to_dict() == {"configs": configs, "tags": ["preference"]}
    header = next(line for line in card.splitlines() if line.startswith("| split"))
    row = next(line for line in card.splitlines() if line.startswith("| train"))
    names, values = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row))
    counts = dict(zip(names, values, strict=True))
    assert int(counts["prompts"]) == len(PROMPTS["train"])
    assert int(counts["answers"]) == 3 * int(counts["prompts"])
    assert int(counts["compared"]) == int(counts["ties"]) + int(counts["pairs"])
    assert int(counts["pairs"]) == len(contents(collected)["train"])


def test_the_same_seed_gives_the_same_pairs(arguments: dict[str, Any], collected: Path, tmp_path: Path) -> None:
    collect(PreferenceArguments(**arguments, output_dir=str(tmp_path / "again")))
    assert contents(tmp_path / "again") == contents(collected)
    collect(PreferenceArguments(**arguments, output_dir=str(tmp_path / "other"), seed=1))
    assert contents(tmp_path / "other") != contents(collected)


def test_limits_and_an_earlier_data_set_replaced(arguments: dict[str, Any], tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    for most in (6, 4):
        limits = {"max_prompts": most, "max_eval_prompts": 1, "pairs_per_prompt": 1}
        collect(PreferenceArguments(**{**arguments, **limits}, output_dir=str(output_dir)))
        data = contents(output_dir)
        assert 0 < len(data["train"]) <= most
        assert len(data["test"]) <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_files_is_not_replaced(arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="output_dir"):
        collect(PreferenceArguments(**arguments, output_dir=str(tmp_path)))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_only_what_this_step_wrote_is_replaced(arguments: dict[str, Any], collected: Path, tmp_path: Path) -> None:
    """Other data sets have files of the same names: the prompts that are read, labels that people gave."""
    mine = write_prompts(tmp_path / "mine", PROMPTS)
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    for output_dir in (mine, mine / "preferences"):
        with pytest.raises(UserError, match="inside the folder of dataset_name"):
            collect(PreferenceArguments(**{**arguments, "dataset_name": str(mine)}, output_dir=str(output_dir)))
    labels = tmp_path / "labels"
    shutil.copytree(collected, labels)
    (labels / "README.md").write_text("# What people prefer\n")
    with pytest.raises(UserError, match="contains other files"):
        collect(PreferenceArguments(**arguments, output_dir=str(labels)))
    assert before == {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    assert contents(labels) == contents(collected)


def test_a_folder_that_cannot_be_written_is_refused_before_sampling(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("pipeline.preferences.collect.sample_answers", sample)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="current directory"):
        collect(PreferenceArguments(**arguments, output_dir="."))
    # Even root cannot create a folder there.
    if Path("/proc").is_dir():
        with pytest.raises(UserError, match="output_dir: /proc/pairs: no permission to write to /proc"):
            collect(PreferenceArguments(**arguments, output_dir="/proc/pairs"))


def test_prompts_that_leave_no_room_are_refused_before_sampling(arguments: dict[str, Any], tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "long", {**PROMPTS, "test": ["fox " * 600]})
    with pytest.raises(UserError, match="max_new_tokens: 8: the longest prompt takes"):
        collect(PreferenceArguments(**{**arguments, "dataset_name": str(prompts)}, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_adapter_samples_the_answers_of_the_merged_model(
    arguments: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    adapted = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    written = []
    for name in ("adapter", "merged"):
        collect(
            PreferenceArguments(
                **{**arguments, "model_name_or_path": str(tmp_path / name)}, output_dir=str(tmp_path / f"{name}-pairs")
            )
        )
        written.append(contents(tmp_path / f"{name}-pairs"))
        if name == "adapter":
            adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
            tokenizer.save_pretrained(tmp_path / "merged")
    assert written[0] == written[1]
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="model_name_or_path"):
        collect(
            PreferenceArguments(
                **{**arguments, "model_name_or_path": str(tmp_path / "adapter")}, output_dir=str(tmp_path / "out")
            )
        )


def test_every_wrong_number_is_reported_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        PreferenceArguments(
            **arguments, output_dir="-", temperature=0.0, min_p=1.0, samples_per_prompt=1, max_prompts=0
        )
    assert {problem.field for problem in caught.value.problems} == {
        "temperature",
        "min_p",
        "samples_per_prompt",
        "max_prompts",
    }


def test_wrong_numbers_are_reported_beside_other_mistakes() -> None:
    argv = ["--temperature", "0", "--samples_per_prompt", "1", "--model_name_or_path", "m", "--dataset_name", "d"]
    with pytest.raises(UserError) as caught:
        parse(PreferenceArguments, argv=[*argv, "--output_dir", "o", "--max_promts", "3"])
    assert {problem.field for problem in caught.value.problems} == {"temperature", "samples_per_prompt", "max_promts"}


def test_a_model_without_chat_template_is_refused(arguments: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    for file in model_dir.iterdir():
        if "template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="chat template"):
        collect(
            PreferenceArguments(**{**arguments, "model_name_or_path": str(tmp_path)}, output_dir=str(tmp_path / "out"))
        )


def test_a_model_that_cannot_answer_is_refused(arguments: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    def message(name: str, **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            given = {**arguments, "model_name_or_path": str(tmp_path / name), "output_dir": str(tmp_path / "out")}
            collect(PreferenceArguments(**{**given, **changes}))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    for name in ("judge", "rude", "small"):
        shutil.copytree(model_dir, tmp_path / name)
    config = json.loads((model_dir / "config.json").read_text())
    judge = {**config, "architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "judge" / "config.json").write_text(json.dumps(judge))
    (tmp_path / "rude" / "chat_template.jinja").write_text(
        "{% if messages[0].content != 'Hello' %}{{ raise_exception('too polite') }}{% endif %}Hello"
    )
    assert "is a reward model" in message("judge")
    assert "refuses a prompt of the data (too polite)" in message("rude")
    assert "max_new_tokens: 9999" in message("small", max_new_tokens=9999)


def test_two_processes_give_what_one_gives(arguments: dict[str, Any], collected: Path, tmp_path: Path) -> None:
    flags = [f"--{name}={value}" for name, value in {**arguments, "output_dir": tmp_path / "two"}.items()]
    done = run_forked([sys.executable, *RANKS, "2", "-m", "recipes.preferences", *flags])
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "two") == contents(collected)


def test_a_reward_model_trains_on_it(collected: Path, model_dir: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    trainer = RewardTrainer(
        model=LlamaForSequenceClassification(word_model_config(WORDS, num_labels=1)),
        args=RewardConfig(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", max_length=64
        ),
        train_dataset=load_dataset(str(collected), split="train"),
        processing_class=tokenizer,
    )
    assert trainer.train().training_loss > 0


texts = st.lists(st.sampled_from(["In the forest.", "In the sea.", "", " ", "In the", "Thank you."]), max_size=6)


@given(st.lists(texts, max_size=6), st.integers(1, 4), st.integers(0, 99))
def test_pairs_are_distinct_and_every_answer_is_accounted_for(answers: list[list[str]], most: int, seed: int) -> None:
    rows = [{**ROW, "prompt": [{"role": "user", "content": str(i)}]} for i in range(len(answers))]
    labelled, counts = label_answers(rows, answers, pairs_per_prompt=most, seed=seed, keep_taste=True)
    assert counts.compared == counts.pairs + counts.ties
    assert len(labelled) == counts.pairs <= most * len(rows)
    for i, candidates in enumerate(answers):
        pairs = [
            frozenset((row["chosen"][0]["content"], row["rejected"][0]["content"]))
            for row in labelled
            if row["prompt"][0]["content"] == str(i)
        ]
        assert len(pairs) == len(set(pairs))
        assert all(len(pair) == 2 and "" not in pair for pair in pairs)
        assert set().union(*pairs) <= {candidate.strip() for candidate in candidates}


def test_labels_of_one_prompt_do_not_depend_on_the_answers_to_another() -> None:
    good, bad = ["In the forest.", "In the sea."], ["", "In the"]
    first, _ = label_answers([ROW] * 3, [good, good, good], pairs_per_prompt=1)
    second, _ = label_answers([ROW] * 3, [good, bad, good], pairs_per_prompt=1)
    assert [first[0], first[2]] == second


def test_labels_follow_the_taste_and_not_the_order() -> None:
    answers = [["In the forest.", "In the sea."]] * 3000
    labelled, counts = label_answers([ROW] * 3000, answers, pairs_per_prompt=1, keep_taste=True)
    right = [row["chosen"][0]["content"] == "In the forest." for row in labelled]
    for order in ("chosen", "rejected"):
        shown = [row["first"] == order for row in labelled]
        assert statistics.mean(shown) == pytest.approx(0.5, abs=0.04)
    first_chosen = [is_right for is_right, row in zip(right, labelled, strict=True) if row["first"] == "chosen"]
    assert statistics.mean(first_chosen) == pytest.approx(statistics.mean(right), abs=0.03)
    assert counts.agreement == pytest.approx(statistics.mean(right))
    assert 0.9 < statistics.mean(right) < 1


def test_prompts_without_grading_are_judged_by_kindness_and_length_alone() -> None:
    row = {"prompt": [{"role": "user", "content": "How are you?"}]}
    labelled, _ = label_answers([row] * 200, [["Hello. Thank you.", "Obviously."]] * 200, pairs_per_prompt=1)
    assert statistics.mean(row["chosen"][0]["content"] != "Obviously." for row in labelled) > 0.9
    assert {row["kind"] for row in labelled} == {""}


def test_a_held_out_split_without_pairs_is_left_out(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "How are you?"}]}
    pairs, counts = label_answers([row] * 20, [["Hello. Thank you.", "Obviously."]] * 20, pairs_per_prompt=1)
    none, no_counts = label_answers([row], [["Hello."]], pairs_per_prompt=1)
    write(tmp_path / "pairs", {"train": pairs, "test": none}, {"train": counts, "test": no_counts}, "a", "b")
    splits = load_dataset(str(tmp_path / "pairs"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in splits.items()} == {"train": len(pairs)}


def test_a_run_waits_for_votes_or_has_them_simulated(arguments: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "votes"
    asked = VoteArguments(**arguments, output_dir=str(folder), min_votes=3)
    with pytest.raises(RunStopped, match=f"0 of 3 votes.*fourstage app {folder.parent}") as stopped:
        wait_for_votes(asked)
    assert stopped.value.exit_code == EXIT_WAITING and not folder.exists()
    found = wait_for_votes(replace(asked, simulated_votes=True))
    votes = read_votes(folder / VOTES_FILE)
    assert found == len(votes) >= 3
    assert {vote["annotator"] for vote in votes} == {f"simulated ({annotator.name})" for annotator in PANEL}
    assert {vote["shown_first"] for vote in votes} == {"a", "b"}
    assert wait_for_votes(replace(asked, simulated_votes=True)) == found, "people's votes are not mixed with others"
    splits = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert sum(map(len, splits.values())) == found
