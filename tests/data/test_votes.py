"""People's votes: they are durable, count once, and make a data set."""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.arguments import DataArguments
from pipeline.data.splits import load_splits
from pipeline.data.votes import VOTES_FILE, Conflict, Vote, VoteLog, read_votes, split_of, valid_votes
from pipeline.errors import UserError

FORK = multiprocessing.get_context("fork")
ANSWERS = st.text(max_size=20) | st.sampled_from(
    ["<script>alert(1)</script>", "\x1b[31m", "\u202eabc", "\ud800", "a\nb"]
)


def vote(number: int, choice: str | None = "a", annotator: str = "ann", **more: Any) -> Vote:
    return {
        "id": f"id{number}",
        "pair": f"pair{number}",
        "time": "2026-01-01T00:00:00+00:00",
        "annotator": annotator,
        "prompt": [{"role": "user", "content": f"What is {number}?"}],
        "a": f"It is {number}.",
        "b": "Hm.",
        "model_a": "2_sft",
        "model_b": "3_ppo",
        "sampling": {"temperature": 1.0},
        "shown_first": "b",
        "choice": choice,
        "undoes": None,
        "seconds": 1.5,
        "comment": "",
        **more,
    }


def test_a_vote_is_a_line_that_counts_once_however_often_it_is_sent(tmp_path: Path) -> None:
    log = VoteLog(tmp_path)
    assert log.add(vote(1)) and not log.add(vote(1)) and not log.add(vote(1, "b"))
    assert [json.loads(line) for line in (tmp_path / VOTES_FILE).read_text().splitlines()] == [vote(1)]
    with pytest.raises(Conflict):
        log.add({**vote(1), "id": "another"})
    assert log.add({**vote(1), "id": "another", "annotator": "bob"}), "but others vote on the same pair"
    for wrong in ({**vote(2), "id": "id1"}, {**vote(1), "annotator": "eve"}, vote(3, None)):
        with pytest.raises(Conflict):
            # The votes have the id of another one, or neither choose nor take back anything.
            log.add(wrong)
    log.close()
    again = VoteLog(tmp_path)
    assert not again.add(vote(1)) and len(again.valid_votes()) == 2
    again.close()


def test_a_vote_is_taken_back_or_corrected_by_a_further_line(tmp_path: Path) -> None:
    log = VoteLog(tmp_path)
    log.add(vote(1))
    log.add({**vote(1, None), "id": "undo", "undoes": "id1"})
    assert not log.valid_votes() and not log.has_vote("ann", "pair1")
    with pytest.raises(Conflict):
        log.add({**vote(1, None), "id": "twice", "undoes": "id1"})
    log.add({**vote(1, "tie"), "id": "new"})
    log.add({**vote(1, "b"), "id": "better", "undoes": "new"})
    with pytest.raises(Conflict):
        log.add({**vote(1, "a", "eve"), "id": "forged", "undoes": "better"})
    assert [one["choice"] for one in log.valid_votes("ann")] == ["b"]
    log.close()
    assert [one["choice"] for one in valid_votes(read_votes(tmp_path / VOTES_FILE))] == ["b"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / VOTES_FILE)
    with pytest.raises(UserError, match="is not a file"):
        read_votes(tmp_path / VOTES_FILE)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(ANSWERS, min_size=1, max_size=5), torn=st.integers(1, 400), keep_newline=st.booleans())
def test_whatever_people_vote_on_comes_back_and_half_a_line_does_no_harm(
    answers: list[str], torn: int, keep_newline: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = VoteLog(folder)
        votes = [vote(number, comment=answer, a=answer) for number, answer in enumerate(answers)]
        for one in votes:
            log.add(one)
        log.close()
        assert read_votes(folder / VOTES_FILE) == votes
        whole = (folder / VOTES_FILE).read_bytes()
        extra = json.dumps(vote(99)).encode()[:torn]
        (folder / VOTES_FILE).write_bytes(whole + extra)
        complete = votes + [vote(99)] * (len(extra) == len(json.dumps(vote(99))))
        assert read_votes(folder / VOTES_FILE) == complete
        log = VoteLog(folder)
        log.add(vote(100))
        log.close()
        assert read_votes(folder / VOTES_FILE) == [*complete, vote(100)]


def test_a_killed_process_loses_no_vote_that_it_confirmed(tmp_path: Path) -> None:
    def vote_on() -> None:
        log = VoteLog(tmp_path)
        for number in range(10**6):
            log.add(vote(number))
            os.write(sender, b"%d\n" % number)

    receiver, sender = os.pipe()
    child = FORK.Process(target=vote_on)
    child.start()
    os.close(sender)
    with os.fdopen(receiver) as lines:
        confirmed = [int(next(lines)) for _ in range(50)]
        os.kill(child.pid or 0, signal.SIGKILL)
        confirmed += map(int, lines)
    child.join()
    log = VoteLog(tmp_path)
    assert {f"id{number}" for number in confirmed} <= {one["id"] for one in log.valid_votes()}
    assert log.add(vote(-1))
    log.close()


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    def open_again() -> None:
        try:
            VoteLog(tmp_path)
        except UserError as error:
            sys.exit(7 if "is writing there" in str(error) else 1)

    log = VoteLog(tmp_path)
    child = FORK.Process(target=open_again)
    child.start()
    child.join()
    assert child.exitcode == 7
    log.close()


def test_a_damaged_line_is_refused_by_its_number(tmp_path: Path) -> None:
    lines = [json.dumps(vote(1)), '{"id": "x"}', json.dumps(vote(2))]
    (tmp_path / VOTES_FILE).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 2: is not a vote"):
        read_votes(tmp_path / VOTES_FILE)
    for wrong in ({"choice": "c"}, {"choice": None}, {"prompt": []}, {"a": 3}, {"undoes": [1]}):
        (tmp_path / VOTES_FILE).write_text(json.dumps(vote(1) | wrong) + "\n")
        with pytest.raises(UserError, match="line 1: is not a vote"):
            read_votes(tmp_path / VOTES_FILE)


def cast(folder: Path, votes: list[Vote]) -> None:
    with (folder / VOTES_FILE).open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in votes)


def test_the_folder_of_votes_is_a_preference_data_set(tmp_path: Path) -> None:
    choices = ["a", "b", "tie", "bad", "skip"]
    votes = [vote(number, choices[number % 5]) for number in range(100)]
    votes.append({**vote(0, None), "id": "undo", "undoes": "id0"})
    cast(tmp_path, votes)
    train, validation = load_splits(DataArguments(dataset_name=str(tmp_path)), "preference", evaluation=True)
    assert validation is not None
    splits = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert list(splits) == ["train", "validation", "test"]
    assert (len(train), len(validation)) == (len(splits["train"]), len(splits["validation"]))
    rows = {row["prompt"][0]["content"]: (name, row) for name in splits for row in splits[name]}
    assert len(rows) == sum(map(len, splits.values())) == 39, "neither ties, bad and skipped pairs nor what was undone"
    for one in votes[1:100]:
        if one["choice"] in ("a", "b"):
            name, row = rows[one["prompt"][0]["content"]]
            assert name == split_of(one["prompt"])
            assert row["chosen"][0]["content"] == one[one["choice"]]
            assert row["rejected"][0]["content"] == one["b" if one["choice"] == "a" else "a"]
            # Answer b was shown first.
            assert row["first"] == ("rejected" if one["choice"] == "a" else "chosen")
            assert row["annotator"] == "ann"
    counts = Counter({"skipped": 0})
    for line in (tmp_path / "README.md").read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        if cells[0] in splits:
            counts.update(
                dict(zip(("prompts", "votes", "pairs", "ties", "bad", "skipped"), map(int, cells[1:]), strict=True))
            )
    assert counts == {"prompts": 99, "votes": 99, "pairs": 39, "ties": 20, "bad": 20, "skipped": 20}


def test_further_votes_join_the_data_set_and_no_prompt_changes_its_split(tmp_path: Path) -> None:
    cast(tmp_path, [vote(number) for number in range(40)])
    args = DataArguments(dataset_name=str(tmp_path))

    def prompts() -> list[set[str]]:
        parts = load_splits(args, "preference", evaluation=True)
        return [{row["prompt"][0]["content"] for row in part or ()} for part in parts]

    before = prompts()
    cast(tmp_path, [vote(number, "b", "bob", id=f"b{number}") for number in range(80)])
    after = prompts()
    assert all(old < new for old, new in zip(before, after, strict=True))
    assert not after[0] & after[1]
    assert len(load_splits(args, "preference", evaluation=True)[0]) > len(after[0]), "each person's vote is a row"


def test_a_folder_without_a_preference_says_how_to_collect_some(tmp_path: Path) -> None:
    cast(tmp_path, [vote(1, "tie"), vote(2, "skip")])
    with pytest.raises(UserError, match="fourstage app"):
        load_splits(DataArguments(dataset_name=str(tmp_path)), "preference", evaluation=False)
