"""The data set repository: the same bytes everywhere, for `load_dataset`, distinct, in constant memory."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from pipeline.errors import UserError
from recipes.worlds.pocket import build as building
from recipes.worlds.pocket.build import PocketArguments, build, card
from recipes.worlds.pocket.problems import pose

Rows = Callable[[str, str], list[dict[str, Any]]]

ROOT = Path(__file__).parents[4]
CONFIGS = ("pretrain", "sft", "preferences", "reasoning")
SPLITS = ("train", "validation", "test")
ALL_SPLITS = dict.fromkeys(CONFIGS, SPLITS) | {"reasoning": (*SPLITS, "test_longer")}
COLUMNS = {
    "pretrain": {"text", "kind"},
    "sft": {"messages", "kind", "require", "reject", "max_words", "test"},
    "preferences": {"prompt", "kind", "require", "reject", "max_words", "test"},
    "reasoning": {"prompt", "answer", "kind", "length"},
}
KINDS = {
    "pretrain": {"facts", "story", "talk", "arithmetic", "code", "recital", "drill"},
    "sft": {"question", "about", "summary", "code", "reasoning", "chat"},
    "preferences": {"question", "about", "summary"},
    "reasoning": {"arithmetic", "ordering", "counting", "logic"},
}
SMALL = {"size_mb": 0.1, "sft_rows": 200, "preference_rows": 50, "reasoning_rows": 100}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


SCRIPT = """
import json, sys
from recipes.worlds.pocket.build import PocketArguments, build
build(PocketArguments(sys.argv[1], **json.loads(sys.argv[2])))
"""


def test_the_bytes_do_not_depend_on_the_process_or_its_hash_seed(tmp_path: Path) -> None:
    build(PocketArguments(str(tmp_path / "here"), **SMALL))
    flags = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    commands = {
        "0": ["-m", "recipes.data", "--output_dir", str(tmp_path / "0"), *flags],
        "4242": ["-c", SCRIPT, str(tmp_path / "4242"), json.dumps(SMALL)],
    }
    for hash_seed, command in commands.items():
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True)
        assert hashes(tmp_path / hash_seed) == hashes(tmp_path / "here")


def test_the_card_lists_the_files_of_each_config(tmp_path: Path) -> None:
    header = DatasetCard(card(PocketArguments(str(tmp_path), seed=7))).data.to_dict()
    assert header == {
        "license": "apache-2.0",
        "language": "en",
        "pretty_name": "Pocket",
        "configs": [
            {
                "config_name": config,
                "data_files": [{"split": split, "path": f"{config}/{split}.parquet"} for split in ALL_SPLITS[config]],
            }
            for config in CONFIGS
        ],
    }
    assert "from seed 7: 150 things" in card(PocketArguments(str(tmp_path), seed=7))


def test_the_card_says_what_may_be_asked_and_how_long_a_problem_may_be(tmp_path: Path) -> None:
    _, _, rest = card(PocketArguments(str(tmp_path))).partition("## What may I ask?\n")
    text = " ".join(rest.partition("\n#")[0].split())
    # What the text says of each kind of problem, and what can be counted in one.
    verbs = "gets|finds|buys|loses|sells|gives away"
    patterns = {
        "arithmetic": (r"and (\S+)(?: to (\d+))? times gets", rf"(?:{verbs}) \d"),
        "counting": (r"; (\d+)(?: to (\d+))? groups", r"\d [a-z]"),
        "ordering": (r"which of (\d+)(?: to (\d+))? ages", r"\d"),
        "logic": (r"each of (\d+)(?: to (\d+))? others", r" of "),
    }
    rng, sizes = random.Random(1), defaultdict(set)
    for _ in range(500):
        problem = pose(rng, "train")
        sizes[problem.kind].add(len(re.findall(patterns[problem.kind][1], problem.text)))
    for kind, (said, _) in patterns.items():
        ((low, high),) = re.findall(said, text)
        assert sizes[kind] == set(range(int(low), int(high or low) + 1)), kind


def test_another_seed_gives_other_rows(tmp_path: Path) -> None:
    for seed in (0, 1):
        build(PocketArguments(str(tmp_path / str(seed)), seed=seed, **SMALL))
    one, other = hashes(tmp_path / "0"), hashes(tmp_path / "1")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


@pytest.mark.parametrize("config", CONFIGS)
def test_load_dataset_reads_every_config(data: Path, tmp_path: Path, config: str) -> None:
    splits = load_dataset(str(data), config, cache_dir=str(tmp_path))
    assert list(splits) == list(ALL_SPLITS[config])
    for name, split in splits.items():
        assert set(split.column_names) == COLUMNS[config]
        assert set(split["kind"]) <= KINDS[config]
        assert len(split) >= 100, name
    assert set(splits["train"]["kind"]) == KINDS[config]


def test_texts_are_not_empty_stripped_and_without_placeholders(rows: Rows) -> None:
    for config in CONFIGS:
        for split in ALL_SPLITS[config]:
            for row in rows(config, split):
                texts = (
                    [row["text"]]
                    if "text" in row
                    else [message["content"] for message in row.get("messages") or row["prompt"]]
                )
                assert all(text and text == text.strip() and "{" not in text for text in texts), texts


def test_conversations_alternate_and_prompts_end_with_the_user(rows: Rows) -> None:
    for split in SPLITS:
        for row in rows("sft", split):
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
        for config in ("preferences", "reasoning"):
            for row in rows(config, split):
                assert [message["role"] for message in row["prompt"]] == ["user"]
    assert any(len(row["messages"]) > 2 for row in rows("sft", "train")), "several turns"


def test_the_training_split_has_the_size_asked_for(rows: Rows) -> None:
    size = sum(len(row["text"].encode()) for row in rows("pretrain", "train"))
    # One document in eight is dropped because it shares words with held-out text.
    assert 0.24e6 < size < 0.31e6


def test_documents_are_distinct(rows: Rows) -> None:
    texts = [row["text"] for row in rows("pretrain", "train")]
    assert len(set(texts)) / len(texts) >= 0.99


def test_sft_works_out_the_share_of_problems_asked_for(tmp_path: Path) -> None:
    for share in (0.0, 1.0):
        build(PocketArguments(str(tmp_path / "data"), share_with_steps=share, **SMALL))
        cache = str(tmp_path / str(share))
        split = load_dataset(str(tmp_path / "data"), "sft", split="train", cache_dir=cache)
        replies = [row["messages"][-1]["content"] for row in split if row["kind"] == "reasoning"]
        straight = [reply.startswith("The answer is") for reply in replies]
        assert replies and set(straight) == {share == 0.0}


def test_an_interrupted_build_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(PocketArguments(str(tmp_path / "data"), **SMALL))
    before = hashes(tmp_path / "data")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(building, "training", interrupted)
        for name in ("data", "new"):
            with pytest.raises(KeyboardInterrupt):
                build(PocketArguments(str(tmp_path / name), seed=1, **SMALL))
    assert hashes(tmp_path / "data") == before
    assert not (tmp_path / "new").exists()
    # What the interrupted build began does not change the next one.
    build(PocketArguments(str(tmp_path / "new"), **SMALL))
    assert hashes(tmp_path / "new") == before


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"^output_dir: .* contains other files"):
        build(PocketArguments(str(tmp_path), **SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_sizes_out_of_range_are_reported_at_once(tmp_path: Path) -> None:
    wrong = {"size_mb": -1.0, "sft_rows": 0, "share_with_steps": 1.5, "carelessness": -0.1}
    with pytest.raises(UserError) as refused:
        build(PocketArguments(str(tmp_path / "data"), **wrong))
    assert {problem.field for problem in refused.value.problems} == set(wrong)
    assert not (tmp_path / "data").exists()


MEASURE = """
import resource, sys
from recipes.worlds.pocket.build import PocketArguments, build
for size in (3, 10):
    build(PocketArguments(f"{sys.argv[1]}/{size}", size_mb=size, sft_rows=200, preference_rows=50, reasoning_rows=100))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_ten_megabytes_are_distinct_and_take_no_more_memory_than_three(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    three, ten = map(int, result.stdout.split())
    # macOS counts in bytes, Linux in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    assert (ten - three) * unit < 10e6, (three, ten)
    split = load_dataset(str(tmp_path / "10"), "pretrain", split="train", cache_dir=str(tmp_path / "cache"))
    seen: set[bytes] = set()
    for batch in split.iter(batch_size=1000):
        seen |= {hashlib.sha256(text.encode()).digest() for text in batch["text"]}
    assert len(seen) / len(split) >= 0.99
