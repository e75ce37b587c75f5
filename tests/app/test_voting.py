"""Prefer: what a page gets, what its votes become, and that nobody sees a pair twice."""

import argparse
import errno
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from pipeline.app import cli
from pipeline.app.models import Models
from pipeline.app.pairs import BATCH, Pair
from pipeline.app.site import Site
from pipeline.app.voting import agreement, content, routes
from pipeline.data.arguments import DataArguments
from pipeline.data.splits import load_splits
from pipeline.data.votes import read_votes
from tests.helpers.files import write_rows
from tests.helpers.small_model import save_model, tokenizer

HOSTILE = "<script>alert(1)</script> ![x](https://example.com/x.png) \x1b[31mred \u202egnp.exe"
TURNS = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello, who are you?"},
    {"role": "user", "content": "Guess."},
]
RULE: dict[str, Any] = {"require": [["cat"]], "reject": [], "max_words": 0, "test": "", "kind": "questions"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two stages, and prompts."""
    run = tmp_path_factory.mktemp("run")
    for seed, stage in enumerate(("2_sft", "3_ppo")):
        save_model(run / stage, seed)
    prompts = [{"prompt": TURNS, **RULE}, {"prompt": [{"role": "user", "content": HOSTILE}], **RULE}]
    prompts += [{"prompt": [{"role": "user", "content": f"What is {i}?"}], **RULE} for i in range(20)]
    write_rows(run / "prompts.jsonl", prompts)
    return run


class Voter:
    """A page that a person has open."""

    def __init__(self, client: TestClient, name: str, page: str = "page", **models: str) -> None:
        self.client, self.who, self.number = client, {"annotator": name, "page": page, **models}, 0
        self.pair: dict[str, Any] = {}
        self.state: dict[str, Any] = {}
        self.votes: list[dict[str, Any]] = []
        self.look()

    def ask(self, path: str, **body: Any) -> Any:
        response = self.client.post(f"/prefer/{path}", json={**self.who, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def show(self, answer: dict[str, Any]) -> dict[str, Any]:
        self.pair, self.state = answer["pair"], answer["state"]
        return answer

    def look(self, have: str = "") -> dict[str, Any]:
        self.show(self.ask(f"next?have={have}"))
        return self.pair

    def vote(self, choice: str | None, **more: Any) -> dict[str, Any]:
        self.number += 1
        vote = f"{self.who['annotator']}-{self.who['page']}-{self.number}"
        ballot = {"vote": vote, "pair": self.pair["pair"], "choice": choice, "seconds": 1.0, **more}
        self.votes.append(ballot)
        return self.show(self.ask("vote", **ballot))


@contextmanager
def server(models: Path, folder: Path, *options: str) -> Iterator[TestClient]:
    """Serve a run whose models are those of `models`."""
    for stage in ("2_sft", "3_ppo"):
        if not (folder / stage).exists():
            (folder / stage).symlink_to(models / stage)
    with TestClient(serve(models, folder, *options)) as client:
        yield client


def site_of(models: Path, folder: Path, *options: str) -> Site:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    arguments = ["--prompts", str(models / "prompts.jsonl"), "--max_new_tokens", "6", *options]
    return Site(folder, Models(folder), parser.parse_args([str(folder), *arguments]))


def serve(models: Path, folder: Path, *options: str) -> FastAPI:
    app = FastAPI()
    app.include_router(routes(site_of(models, folder, *options)))
    return app


def votes_in(folder: Path) -> list[dict[str, Any]]:
    return read_votes(folder / "votes" / "votes.jsonl")


def test_a_vote_says_which_text_was_preferred_and_which_was_seen_first(models: Path, tmp_path: Path) -> None:
    choices = []
    with server(models, tmp_path, "--pair", "2_sft", "3_ppo") as client:
        ann = Voter(client, "ann")
        assert "no votes between" in ann.ask("rates")[0] and ann.state["pace"] is None
        for number, choice in enumerate(["first", "second", "tie", "bad", "skip"] * 3):
            choices.append((choice, ann.pair))
            assert "2_sft" not in json.dumps(ann.pair) and "3_ppo" not in json.dumps(ann.pair)
            ann.vote(choice, comment=f"no. {number}")
            assert ann.state["count"] == number + 1 == len(votes_in(tmp_path)), "on disk before the page says so"
        wins = [vote["choice"] == {"2_sft": "b"}.get(vote["model_a"]) for vote in votes_in(tmp_path)]
        ties = sum(vote["choice"] in ("tie", "bad") for vote in votes_in(tmp_path))
        percent = round(100 * (sum(wins) + ties / 2) / 12)
        (rate,) = ann.ask("rates")
        assert rate.startswith(f"3_ppo against 2_sft: preferred in {percent}% (") and rate.endswith("of 12 votes")
        assert ann.state["pace"] == 1.0 and "alpha" not in ann.state
    votes = votes_in(tmp_path)
    assert len({vote["pair"] for vote in votes}) == 15
    assert {(vote["model_a"], vote["model_b"]) for vote in votes} == {("2_sft", "3_ppo")}
    assert {vote["shown_first"] for vote in votes} == {"a", "b"}, "the order is random"
    for number, (vote, (choice, pair)) in enumerate(zip(votes, choices, strict=True)):
        second = "b" if vote["shown_first"] == "a" else "a"
        assert vote["choice"] == {"first": vote["shown_first"], "second": second}.get(choice, choice)
        if HOSTILE not in vote["prompt"][0]["content"]:
            assert pair["prompt"] == vote["prompt"]
        assert (vote["annotator"], vote["comment"], vote["undoes"]) == ("ann", f"no. {number}", None)
        assert vote["sampling"]["temperature"] == 1.0
    train, _ = load_splits(DataArguments(dataset_name=str(tmp_path / "votes")), "preference", evaluation=False)
    assert (tmp_path / "votes" / "train.parquet").exists() and len(train) <= 6


def test_a_vote_is_taken_back_and_corrected(models: Path, tmp_path: Path) -> None:
    with server(models, tmp_path) as client:
        ann = Voter(client, "ann")
        first = ann.pair
        ann.vote("first")
        second = ann.pair
        ann.pair = first
        ann.vote(None, undoes=ann.votes[-1]["vote"])
        assert ann.pair == first and ann.state["count"] == 0, "the pair is shown again"
        ann.vote("second")
        assert ann.pair == second
        ann.pair = first
        ann.vote("tie", undoes=ann.votes[-1]["vote"])
        assert ann.pair == second and ann.state["count"] == 1
        (listed,) = ann.ask("votes")
        assert (listed["pair"], listed["choice"], listed["first"]) == (first["pair"], "tie", first["first"])
        ann.pair = first
        assert "Not counted" in ann.vote("first")["refused"]
        assert ann.state["count"] == 1
    assert [vote["undoes"] is None for vote in votes_in(tmp_path)] == [True, False, True, False]


def test_a_vote_sent_twice_counts_once(models: Path, tmp_path: Path) -> None:
    with server(models, tmp_path) as client:
        ann = Voter(client, "ann")
        ann.vote("first")
        for _ in range(2):
            answer = ann.ask("vote", **ann.votes[0])
            assert not answer["refused"] and answer["state"]["count"] == 1
    with server(models, tmp_path) as client:
        assert Voter(client, "ann").ask("vote", **ann.votes[0])["state"]["count"] == 1
    assert len(votes_in(tmp_path)) == 1


def test_pages_keep_their_places_also_on_a_restarted_server(models: Path, tmp_path: Path) -> None:
    with server(models, tmp_path) as client:
        pages = [Voter(client, name, page) for name, page in (("ann", "1"), ("ann", "2"), ("bob", "3"))]
        assert len({page.pair["pair"] for page in pages}) == 3
        for page in pages:
            page.vote("first")
        places = [page.pair for page in pages]
        assert [page.look() for page in pages] == places, "a reload changes nothing"
    with server(models, tmp_path) as client:
        for page, place in zip(reversed(pages), reversed(places), strict=True):
            page.client = client
            assert page.look(have=place["pair"]) == place
    with server(models, tmp_path) as client:
        new = Voter(client, "ann", "another-tab")
        assert new.pair == places[0], "the first pair without a vote"


def test_nobody_sees_a_pair_twice_and_everybody_sees_the_shared_ones(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.app.voting.FEW_SHARED", 4)
    with server(models, tmp_path, "--overlap", "0.25", "--password", "x") as client:
        for name, choices in (("ann", "first"), ("bob", "second"), ("eve", "tie")):
            voter = Voter(client, name)
            for _ in range(16):
                voter.vote(choices)
        assert client.post("/prefer/rates").status_code == 404
        printed = capsys.readouterr().out
        # The terminal of whoever runs the page, which other people may open, says what no visitor may see.
        assert "agreement on 4 shared pairs: Krippendorff's alpha " in printed
        assert "no votes between two different models yet" in printed
    assert agreement(votes_in(tmp_path))[1] == 4
    by_pair = Counter(vote["pair"] for vote in votes_in(tmp_path))
    assert Counter(by_pair.values()) == {3: 4, 1: 36}
    lines = map(json.loads, (tmp_path / "votes" / "pairs.jsonl").read_text().splitlines())
    assert sum("a" in line for line in lines) <= 60, "pairs are sampled as they are needed"


def test_agreement_is_krippendorffs_alpha_of_the_shared_pairs() -> None:
    rng = np.random.default_rng(0)
    choices = ["a", "b", "tie", "bad", "skip"]
    votes = [
        {"annotator": name, "pair": f"p{pair}", "choice": choices[min(4, int(rng.exponential(pair % 3 + 0.3)))]}
        for name in ("ann", "bob", "eve")
        for pair in range(30)
        if name != "eve" or pair % 2
    ]
    data = np.full((3, 30), np.nan)
    for vote in votes:
        if vote["choice"] != "skip":
            row = ("ann", "bob", "eve").index(str(vote["annotator"]))
            data[row, int(str(vote["pair"])[1:])] = choices.index(str(vote["choice"]))
    shared = (~np.isnan(data)).sum(0) > 1
    alpha, count = agreement(votes)
    assert count == shared.sum()
    assert alpha == pytest.approx(krippendorff.alpha(reliability_data=data, level_of_measurement="nominal"))
    agreed = [{**vote, "choice": "a" if int(str(vote["pair"])[1:]) % 2 else "b"} for vote in votes]
    assert agreement(agreed)[0] == 1.0
    assert np.isnan(agreement(votes[:30])[0]), "one person does not agree with anybody"


def test_a_prompt_can_be_typed_unless_it_is_too_long_or_spells_a_special_token(models: Path, tmp_path: Path) -> None:
    end = tokenizer().eos_token
    with server(models, tmp_path) as client:
        ann = Voter(client, "ann")
        pair = ann.pair
        ann.show(ann.ask("prompt", text=HOSTILE))
        assert "\x1b" not in json.dumps(ann.pair) and "\u202e" not in ann.pair["prompt"][0]["content"]
        ann.vote("first")
        assert ann.pair == pair, "the pair that was shown before comes back"
        assert "256 tokens" in ann.ask("prompt", text="cat " * 30_000)["pair"]["error"]
        assert "special token" in ann.ask("prompt", text=f"What is {end}?")["pair"]["error"]
    (vote,) = votes_in(tmp_path)
    assert vote["prompt"] == [{"role": "user", "content": HOSTILE}], "the data have what was typed"


def test_what_others_would_have_said_is_told_after_the_vote(models: Path, tmp_path: Path) -> None:
    with server(models, tmp_path, "--overlap", "1") as client:
        ann, bob = Voter(client, "ann"), Voter(client, "bob")
        pair = ann.pair["pair"]
        assert bob.pair["pair"] == pair
        assert client.post(f"/prefer/opinions?pair={pair}", json=ann.who).status_code == 403
        ann.vote("first")
        bob.vote("second")
        opinions = "\n".join(ann.ask(f"opinions?pair={pair}"))
        assert "simulated annotators" in opinions and "other people" in opinions and "2_sft" in opinions


def test_what_a_page_may_not_ask_for_is_refused(models: Path, tmp_path: Path) -> None:
    with server(models, tmp_path) as client:
        ann = Voter(client, "ann")
        ballot = {**ann.who, "vote": "x", "pair": ann.pair["pair"], "choice": "first"}
        for path, body, code in (
            ("next", {**ann.who, "a": "/etc"}, 422),
            ("next", {"annotator": "ann"}, 422),
            ("vote", {**ballot, "pair": "unknown"}, 410),
            ("vote", {**ballot, "choice": "a"}, 422),
            ("vote", {**ballot, "vote": "../x"}, 422),
            ("vote", {**ballot, "comment": "x" * 6000}, 422),
            # Bob saw these answers in another order, or not at all.
            ("vote", {**ballot, "annotator": "bob"}, 410),
        ):
            assert client.post(f"/prefer/{path}", json=body).status_code == code, (path, body)
        assert "Not counted" in ann.ask("vote", **ballot | {"choice": None})["refused"]
    assert not votes_in(tmp_path)


def test_the_order_cannot_be_computed_from_what_the_page_gets() -> None:
    pairs = [Pair("id", [], "a", "b", "2_sft", "3_ppo", {"seed": seed}) for seed in range(20)]
    assert {pair.shown_first("ann") for pair in pairs} == {"a", "b"}
    assert len({pairs[0].shown_first("ann") for _ in range(20)}) == 1


def test_a_vote_that_cannot_be_written_is_not_confirmed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with server(models, tmp_path) as client:
        ann = Voter(client, "ann")
        ballot = {**ann.who, "vote": "x", "pair": ann.pair["pair"], "choice": "first"}
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert client.post("/prefer/vote", json=ballot).status_code == 507
        assert not votes_in(tmp_path)
        assert client.post("/prefer/vote", json=ballot).json()["state"]["count"] == 1


def test_a_disk_that_is_full_for_a_moment_does_not_end_the_pairs(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with server(models, tmp_path) as client:
        page = Voter(client, "ann").who
        typed = {**page, "text": "What is a cat?"}
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            for _ in range(3):
                assert client.post("/prefer/next", json={**page, "annotator": "bob"}).status_code == 507
            assert client.post("/prefer/prompt", json=typed).status_code == 507
        # A pair that was being written meanwhile fails as well, for which a page asks again.
        client.post("/prefer/next", json=page)
        for number in range(3 * BATCH):
            assert "pair" in Voter(client, f"annotator {number}").pair
        assert client.post("/prefer/prompt", json=typed).status_code == 200
    with (tmp_path / "votes" / "pairs.jsonl").open() as file:
        assert all(json.loads(line) for line in file)


def test_guidelines_are_a_file_of_which_nothing_runs_or_is_fetched(models: Path, tmp_path: Path) -> None:
    for stage in ("2_sft", "3_ppo"):
        (tmp_path / stage).symlink_to(models / stage)
    text = "# Be fair\n\n**Right** first.\n\n<script>alert(1)</script>\n\n![x](https://example.com/x.png)\n"
    (tmp_path / "rules.md").write_text(text)
    options = ("--guidelines", str(tmp_path / "rules.md"), "--pair", "2_sft", "3_ppo")
    variables = content(site_of(models, tmp_path, *options))
    assert "<h1>Be fair</h1>" in variables["guidelines"] and "<strong>Right</strong>" in variables["guidelines"]
    assert "<script" not in variables["guidelines"] and "<img" not in variables["guidelines"]
    assert variables["chosen"] == ("2_sft", "3_ppo")


def test_answers_that_are_always_the_same_are_said_to_be(models: Path, tmp_path: Path) -> None:
    with server(models, tmp_path, "--temperature", "0.0001") as client:
        assert "equal answers" in Voter(client, "ann").pair["error"]
