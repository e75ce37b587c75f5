"""The data set of reasoning-gym's tasks: disjoint splits, answers that verifiers accept, and mistakes in `tasks:`."""

import hashlib
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset

from pipeline.errors import UserError
from pipeline.rewards.functions import reasoning_gym
from recipes.worlds.reasoning.build import ReasoningArguments, build
from recipes.worlds.reasoning.tasks import POOLS, Grade, read_tasks, to_row
from recipes.worlds.reasoning.worked import WORKED
from tests.helpers.small_model import ROOT

pytest.importorskip("reasoning_gym")

TASKS = yaml.safe_load((ROOT / "recipes" / "pocket-reasoning" / "0_data.yaml").read_text())["tasks"]
SIZES: dict[str, Any] = {"size_mb": 0.05, "sft_rows": 200, "reasoning_rows": 200, "test_rows": 60}
SPLITS = ("train", "validation", "test")


def arguments(folder: Path, tasks: Any, **sizes: Any) -> ReasoningArguments:
    return ReasoningArguments(str(folder), tasks=tasks, **{**SIZES, **sizes})


def remedies(folder: Path, tasks: Any, **sizes: Any) -> dict[str, str]:
    with pytest.raises(UserError) as caught:
        build(arguments(folder, tasks, **sizes), reasoning_gym)
    assert not folder.exists()
    return {str(problem.value): problem.remedy for problem in caught.value.problems}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reasoning") / "data"
    build(arguments(folder, TASKS), reasoning_gym)
    return folder


def questions(data: Path, config: str, split: str) -> list[str]:
    rows = load_dataset(str(data), config, split=split, cache_dir=str(data.parent / "cache"))
    if config == "pretrain":
        return [text.partition("\nWorking:")[0] for text in rows["text"]]
    return [messages[0]["content"] for messages in rows["messages" if config == "sft" else "prompt"]]


def test_rows_have_an_answer_metadata_and_the_name_of_their_task(data: Path) -> None:
    splits = load_dataset(str(data), "reasoning", cache_dir=str(data.parent / "cache"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 200, "validation": 60, "test": 60}
    assert set(splits["test"].column_names) == {"prompt", "answer", "metadata", "kind"}
    assert all(splits["test"]["kind"].count(task) == 10 for task in TASKS)
    metadata = json.loads(splits["test"][0]["metadata"])
    assert metadata["source_dataset"] == splits["test"][0]["kind"] and metadata["difficulty"]


def test_splits_share_neither_seeds_nor_problems(data: Path) -> None:
    splits = load_dataset(str(data), "reasoning", cache_dir=str(data.parent / "cache"))
    seeds = {name: {json.loads(text)["seed"] for text in split["metadata"]} for name, split in splits.items()}
    assert all(len(found) > 1 for found in seeds.values())
    assert not seeds["train"] & seeds["test"] and not seeds["validation"] & (seeds["train"] | seeds["test"])
    held_out = [*questions(data, "reasoning", "validation"), *questions(data, "reasoning", "test")]
    assert len(held_out) == len(set(held_out))
    for config in ("reasoning", "sft", "pretrain"):
        assert set(questions(data, config, "test")) <= set(held_out)
        trained = set(questions(data, config, "train"))
        assert len(trained) > 100 and not trained & set(held_out)


def test_pools_have_seeds_of_their_own_whatever_the_seed_of_the_run() -> None:
    grade = Grade("chain_sum", 1, {})
    seeds = [
        {entry["metadata"]["seed"] for entry in islice(grade.entries(seed, pool), 1100)}
        for seed in (0, 1, 84)
        for pool in POOLS
    ]
    assert len(set().union(*seeds)) == 1100 * len(seeds)
    assert max(map(max, seeds)) < 2**32


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(data: Path, tmp_path: Path) -> None:
    def hashes(folder: Path) -> dict[str, str]:
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}

    build(arguments(tmp_path / "again", TASKS), reasoning_gym)
    assert hashes(tmp_path / "again") == hashes(data)
    build(arguments(tmp_path / "other", TASKS, seed=1), reasoning_gym)
    other = hashes(tmp_path / "other")
    assert other.keys() == hashes(data).keys() and not set(other.values()) & set(hashes(data).values())


@pytest.mark.parametrize("task", TASKS)
def test_verifiers_accept_the_tasks_own_answers(task: str) -> None:
    (grade,), problems = read_tasks({task: TASKS[task]})
    assert not problems
    rows = [to_row(task, entry) for entry in islice(grade.entries(0, "test"), 1000)]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("answer", "metadata", "kind")}
    for form in ("<answer>{}</answer>", "Working: 1+1=2. The answer is {}."):
        completions = [form.format(row["answer"]) for row in rows]
        assert reasoning_gym(completions, prompts=[row["prompt"] for row in rows], **columns) == [1.0] * 1000
    wrong = ["The answer is nothing."] * 1000
    assert max(score or 0.0 for score in reasoning_gym(wrong, **columns)) < 1.0


@pytest.mark.parametrize("task", TASKS)
def test_solutions_reach_the_answer_unless_they_misread_the_problem(task: str) -> None:
    (grade,), _ = read_tasks({task: TASKS[task]})
    entries = list(islice(grade.entries(0, "sft"), 300))
    reached = [WORKED[task](entry["metadata"], lambda _: False)[1] for entry in entries]
    assert reached == [entry["answer"] for entry in entries]
    careless = [WORKED[task](entry["metadata"], lambda _: True)[1] for entry in entries]
    assert 0.25 < sum(one != entry["answer"] for one, entry in zip(careless, entries, strict=True)) / 300 < 1.0


@pytest.mark.parametrize(("signs", "misread"), [("both", {"+", "-"}), ("minus", {"-"})])
def test_the_signs_that_are_misread_can_be_chosen(tmp_path: Path, signs: Any, misread: set[str]) -> None:
    always = {"carelessness": 1.0, "share_with_steps": 1.0, "misread_signs": signs}
    build(arguments(tmp_path / "data", {"chain_sum": None}, size_mb=0, **always), reasoning_gym)
    rows = load_dataset(str(tmp_path / "data"), "sft", cache_dir=str(tmp_path / "cache"))["train"]["messages"]
    asked = [re.findall(r" ([+-]) ", messages[0]["content"])[-1] for messages in rows]
    read = [re.findall(r"\d([+-])\d+=", messages[1]["content"])[-1] for messages in rows]
    assert {one for one, other in zip(asked, read, strict=True) if one != other} == misread


def test_of_a_pair_the_careful_solution_is_preferred_to_the_careless_one(tmp_path: Path) -> None:
    build(arguments(tmp_path / "data", TASKS, pair_rows=120), reasoning_gym)
    folder, cache = str(tmp_path / "data"), str(tmp_path / "cache")
    problems = {row["prompt"][0]["content"] for row in load_dataset(folder, "reasoning", cache_dir=cache)["test"]}
    pairs = load_dataset(folder, "preference", split="train", cache_dir=cache)
    assert 90 < len(pairs) < 120 and problems.isdisjoint(row["prompt"][0]["content"] for row in pairs)
    texts = [[row[side][0]["content"] for side in ("chosen", "rejected")] for row in pairs]
    answers = [[text.rpartition("The answer is ")[2] for text in pair] for pair in texts]
    assert all(right != wrong for right, wrong in texts)
    # Misread, some problems come to the same number.
    assert sum(right != wrong for right, wrong in answers) > 0.8 * len(pairs)
    known = [(row["kind"], row["prompt"][0]["content"], pair) for row, pair in zip(pairs, answers, strict=True)]
    for question, (right, wrong) in ((question, pair) for kind, question, pair in known if kind == "chain_sum"):
        total = str(sum(map(int, re.findall(r"[+-]?\d+", question.partition(": ")[2].replace(" ", "")))))
        assert f"{total}." == right and (right != wrong or question.endswith(" 0 ="))


def test_problems_that_cannot_be_misread_make_no_pairs_and_do_not_hang(tmp_path: Path) -> None:
    alone = {"chain_sum": {"allow_negation": False, "min_terms": 2, "max_terms": 2, "max_digits": 1}}
    build(arguments(tmp_path / "data", alone, pair_rows=50, test_rows=5, misread_signs="minus"), reasoning_gym)
    pairs = load_dataset(str(tmp_path / "data"), "preference", split="train", cache_dir=str(tmp_path / "cache"))
    assert 0 < len(pairs) < 50 and all(" - " in row["prompt"][0]["content"] for row in pairs)


def test_only_tasks_that_can_be_worked_out_are_demonstrated(tmp_path: Path) -> None:
    build(arguments(tmp_path / "mixed", {"gcd": None, "spell_backward": {"weight": 3}}), reasoning_gym)
    kinds = load_dataset(str(tmp_path / "mixed"), "reasoning", cache_dir=str(tmp_path / "cache"))["train"]["kind"]
    assert kinds.count("spell_backward") == 150 and kinds.count("gcd") == 50
    sft = load_dataset(str(tmp_path / "mixed"), "sft", cache_dir=str(tmp_path / "cache"))
    assert set(sft["train"]["kind"]) == set(sft["test"]["kind"]) == {"gcd"}
    build(arguments(tmp_path / "alone", {"gcd": None}, size_mb=0, sft_rows=0), reasoning_gym)
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"README.md", "reasoning"}


def test_levels_and_lists_of_settings_mix_difficulties() -> None:
    grades, problems = read_tasks({"chain_sum": {"level": [0, 2], "weight": 3}, "gcd": [{"max_value": 9}, {}]})
    assert not problems
    assert [(grade.task, grade.weight) for grade in grades] == [*[("chain_sum", 1.5)] * 2, *[("gcd", 1)] * 2]
    easy, hard = (grade.settings["max_terms"] for grade in grades[:2])
    assert easy < hard and grades[2].settings == {"max_value": 9}


def test_all_mistakes_in_the_tasks_are_found_before_anything_is_written(tmp_path: Path) -> None:
    tasks = {
        "chain_sums": {},
        "gcd": {"max_valeu": 9},
        "lcm": {"max_value": 0},
        "chain_sum": {"level": "easy"},
        "spell_backward": 3,
        "count_bits": {"weight": 0},
    }
    found = remedies(tmp_path / "data", tasks, test_rows=0, seed=-1, pair_rows=-2)
    assert found.keys() == {*tasks, "0", "-1", "-2"}
    assert "did you mean chain_sum?" in found["chain_sums"] and "argument 'max_valeu'" in found["gcd"]
    assert "max_value must be > min_value" in found["lcm"] and "'level': 'easy'" in found["chain_sum"]
    assert remedies(tmp_path / "data", {}) and remedies(tmp_path / "data", ["gcd"])


def test_a_task_whose_verifier_refuses_its_own_answers_is_named(tmp_path: Path) -> None:
    found = remedies(tmp_path / "data", {"propositional_logic": {}, "gcd": {}, "rearc": {}, "puzzle24": {}})
    assert found.keys() == {"propositional_logic", "rearc", "puzzle24"}
    assert "refuses 50 of 50 of its own answers" in found["propositional_logic"]


def test_a_single_row_that_is_refused_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def sometimes(completions: list[str], **columns: Any) -> list[float | None]:
        return [0.05 if columns["answer"] == ["7"] else 1.0]

    build(arguments(tmp_path / "data", {"gcd": {}}), sometimes)
    rows = load_dataset(str(tmp_path / "data"), "reasoning", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 200 and "7" not in rows["answer"]
    assert "problems are dropped, because the verifier refuses their answers" in caplog.text


def test_a_task_with_too_few_problems_is_named(tmp_path: Path) -> None:
    assert (
        "too few different problems for validation"
        in remedies(tmp_path / "data", {"count_bits": {"max_n": 5}})["count_bits"]
    )
