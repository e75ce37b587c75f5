"""The votes and the pairs of a run: which pair a page shows, what is voted, and what can be said about the votes."""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from fastapi import HTTPException
from pydantic import BaseModel, Field

from pipeline.app.agreement import agreement
from pipeline.app.pairs import Pair, Pairs, Sampling, Source
from pipeline.app.site import Site
from pipeline.data import votes
from pipeline.data.arguments import DataArguments
from pipeline.data.splits import load_splits
from pipeline.data.votes import Vote, VoteLog
from pipeline.errors import Problem, UserError
from pipeline.evaluation.settings import SOURCE_FIELDS, VOTES, move, recorded
from pipeline.files import read_json
from pipeline.models.loading import is_reward_model, load_config, load_model
from pipeline.preferences.judges import score
from pipeline.report.text import visible
from pipeline.rewards.annotators import judge_match
from pipeline.rewards.grading import is_gradable

logger = logging.getLogger(__name__)

LISTED = 200
"""Own votes that the page lists, the newest ones."""
STREAMED = 10_000
"""Prompts that are read of a stream."""
EXPORT_SECONDS = 2.0
"""Time after a vote until the data set is written, together with those that follow."""
OPINIONS = {1.0: "A", 0.0: "B", 0.5: "neither"}

NAME = Field(default="", max_length=80)
ID = Field(pattern=r"^[\w-]{1,64}$")


class Page(BaseModel):
    """A page in a browser: who looks at it, its id, and the models whose answers it compares."""

    annotator: str = NAME
    page: str = ID
    a: str = NAME
    b: str = NAME


class Ballot(Page):
    """A vote as the page sends it; `choice` is by the order on the page, and null to take `undoes` back."""

    vote: str = ID
    pair: str = ID
    choice: str | None = Field(pattern=r"^(first|second|tie|bad|skip)$")
    undoes: str | None = Field(default=None, max_length=64)
    seconds: float | None = Field(default=None, ge=0, le=1e9)
    comment: str = Field(default="", max_length=5000)


class Typed(Page):
    """A prompt that was typed."""

    text: str = Field(min_length=1)


def default_source(site: Site) -> Source:
    """Return the models that are compared unless others are chosen: those of `--pair`, or that of the step for votes.

    Raises:
        UserError: If `--pair` names a model that the page does not have.
    """
    names = site.models.names
    if unknown := [name for name in site.options.pair or () if name not in names]:
        raise UserError(Problem("--pair", unknown[0], f"is not a model of the page; choose from: {', '.join(names)}"))
    if site.options.pair:
        return site.options.pair[0], site.options.pair[-1]
    asked = Path(votes_step(site).get("model_name_or_path", "")).name
    tuned = asked if asked in names else next((name for name in names if "_sft" in name), names[-1])
    return tuned, tuned


def votes_step(site: Site) -> dict[str, Any]:
    """Return the settings of the run's step for votes, {} if it has none."""
    steps = read_json(site.run / "run.json").get("steps", {})
    values = (step.get("values", {}) for step in steps.values())
    return next((dict(found) for found in values if "min_votes" in found), {})


def load_prompts(site: Site) -> Sequence[Mapping[str, Any]]:
    """Return the prompts of `--prompts`, or those that the run's stage 3 is trained on; there may be none.

    Raises:
        UserError: If a data set that was named cannot be read.
    """
    if site.options.prompts:
        args = DataArguments(dataset_name=site.options.prompts, dataset_config=site.options.prompts_config)
    else:
        settings = move(recorded(site.run, ""), site.run)
        source = settings["trained_on"].get("prompts")
        if not source:
            return ()
        args = DataArguments(**{k: v for k, v in source.items() if k in SOURCE_FIELDS and k != "grade"})
    try:
        prompts, _ = load_splits(args, "prompt", evaluation=False)
    except UserError as error:
        if not site.options.prompts:
            return ()
        raise UserError(*(Problem("--prompts", one.value, one.remedy) for one in error.problems)) from None
    return prompts if isinstance(prompts, Dataset) else list(prompts.take(STREAMED))


class Poll:
    """The votes and the pairs of a run, for the routes below."""

    def __init__(self, site: Site) -> None:
        self.site, self.source = site, default_source(site)
        options = site.options
        self.log = VoteLog(site.run / VOTES)
        step = votes_step(site)
        given = {item.name: getattr(options, item.name) for item in fields(Sampling)}
        given = {name: step.get(name) if value is None else value for name, value in given.items()}
        sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
        path = site.run / VOTES / "pairs.jsonl"
        self.pairs = Pairs(path, site.models, load_prompts(site), sampling, options.overlap)
        self.goal: int | None = options.goal or step.get("min_votes")
        self._open: dict[tuple[str, str], Pair] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._mutex = threading.Lock()
        self._timer: threading.Timer | None = None
        self._exporting = threading.Lock()
        self.export()

    def export(self) -> None:
        """Write the data set of the votes."""
        with self._mutex:
            self._timer = None  # later votes need another one
        with self._exporting:
            if self.log.standing():
                try:
                    votes.update_data_set(self.site.run / VOTES)
                except OSError as error:
                    # The votes themselves are safe, and the data set is made anew after each of them.
                    logger.warning("The data set of the votes cannot be written (%s).", error.strerror or error)

    def close(self) -> None:
        """End with a data set that is up to date."""
        if self._timer is not None:
            self._timer.cancel()
        self.export()
        self.log.close()

    def find(self, pair: str) -> Pair:
        """Return a pair by its id."""
        found = self.pairs.by_id.get(pair)
        if found is None:
            raise HTTPException(410, "This pair is not known any more; here is another one.")
        return found

    def source_of(self, page: Page) -> Source:
        """Return the models that a page compares."""
        chosen = page.a or self.source[0], page.b or self.source[1]
        if not set(chosen) <= set(self.site.models.names):
            raise HTTPException(422, "There is no such model on this page.")
        return chosen

    def next(self, page: Page, have: str = "") -> Pair:
        """Return the pair that a page shows: the one that it has, or else the first one without a vote.

        Pairs on other pages of the same annotator are passed over.
        """
        name, source = page.annotator, self.source_of(page)
        with self._locks[name]:  # of two pages of the same person, the second waits for the first one's pair
            sequence = self.pairs.sequence(name, source)
            held = self._open.get((name, page.page))
            kept = [pair for pair in sequence if pair.pair == have or pair == held]
            opened = list(self._open.items())  # pages of other people come and go meanwhile
            others = {pair.pair for key, pair in opened if key[0] == name and key != (name, page.page)}
            rest = (pair for pair in sequence if pair.pair not in others)
            pair = next((one for one in (*kept, *rest) if not self.log.has_vote(name, one.pair)), None)
            self._open.pop((name, page.page), None)
            if pair is None:
                pair = self.pairs.allot(name, source, pages=len(self._open) + 1)
            self._open[name, page.page] = pair
            return pair

    def type(self, typed: Typed) -> Pair:
        """Return a pair of answers to a prompt that was typed."""
        with self._locks[typed.annotator]:
            pair = self.pairs.typed(typed.annotator, self.source_of(typed), typed.text)
            self._open[typed.annotator, typed.page] = pair
            return pair

    def vote(self, ballot: Ballot) -> None:
        """Record a vote: it is on disk when this returns.

        Raises:
            Conflict: If it cannot count.
        """
        pair, name = self.find(ballot.pair), ballot.annotator
        if pair not in self.pairs.sequence(name, pair.source) and not self.log.has_vote(name, pair.pair):
            raise HTTPException(410, "This pair was shown under another name; here is another one.")
        first = pair.shown_first(name)
        by_place = {"first": first, "second": votes.OTHER[first]}
        choice = by_place.get(ballot.choice or "", ballot.choice)
        self.log.add(
            {
                "id": ballot.vote,
                "pair": pair.pair,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "annotator": name,
                "prompt": pair.prompt,
                "a": pair.a,
                "b": pair.b,
                "model_a": pair.model_a,
                "model_b": pair.model_b,
                "sampling": pair.sampling,
                "shown_first": first,
                "choice": choice,
                "undoes": ballot.undoes,
                "seconds": ballot.seconds,
                "comment": ballot.comment,
            }
        )
        with self._mutex:
            if choice is None:
                self._open[name, ballot.page] = pair
            if self._timer is None:
                self._timer = threading.Timer(EXPORT_SECONDS, self.export)
                self._timer.daemon = True
                self._timer.start()

    def state(self, annotator: str) -> dict[str, Any]:
        """Return what the page says about the votes so far."""
        standing = self.log.standing()
        alpha, shared = agreement(standing)
        return {
            "annotator": annotator,
            "count": sum(vote["annotator"] == annotator for vote in standing),
            "all": len(standing),
            "usable": sum(vote["choice"] in votes.OTHER for vote in standing),
            "people": len({vote["annotator"] for vote in standing}),
            "goal": self.goal,
            "alpha": None if math.isnan(alpha) else round(alpha, 3),
            "shared": shared,
        }

    def listed(self, annotator: str) -> list[dict[str, Any]]:
        """Return an annotator's votes as the page lists them, the newest first."""
        return [
            {
                "vote": vote["id"],
                "pair": vote["pair"],
                "choice": place(vote),
                "prompt": visible(vote["prompt"][-1]["content"], 300),
                "first": visible(vote[vote["shown_first"]], 300),
                "second": visible(vote[votes.OTHER[vote["shown_first"]]], 300),
                "comment": visible(vote.get("comment") or "", 300),
            }
            for vote in reversed(self.log.standing(annotator)[-LISTED:])
            if vote["pair"] in self.pairs.by_id
        ]

    def opinions(self, annotator: str, pair: Pair) -> list[str]:
        """Return what others would have said about a pair that has the annotator's vote, one line each."""
        if not self.log.has_vote(annotator, pair.pair):
            raise HTTPException(403, "Vote first.")
        first = pair.shown_first(annotator)
        shown = [getattr(pair, side) for side in (first, votes.OTHER[first])]
        lines = []
        if is_gradable(pair.rule):
            (outcome,) = judge_match(shown[:1], shown[1:], [{**pair.rule, "prompt": pair.prompt}])
            lines.append(f"The simulated annotators, without noise, would have preferred {OPINIONS[outcome]}.")
        if self.reward_model is not None:
            conversations = [[*pair.prompt, {"role": "assistant", "content": text}] for text in shown]
            scores = score(*self.reward_model, conversations)
            said = f"The reward model scores A {scores[0]:+.2f} and B {scores[1]:+.2f}."
            lines.append(said)
        others = [vote for vote in self.log.of_pair(pair.pair) if vote["annotator"] != annotator]
        if others:
            counts = [f"{sum(_as_seen(vote, first) == name for vote in others)} {name}" for name in ("A", "B")]
            lines.append(f"Of {len(others)} other people who saw this pair: {', '.join(counts)}.")
        names = [getattr(pair, f"model_{side}") for side in (first, votes.OTHER[first])]
        lines.append(f"A was written by {names[0]}, B by {names[1]}.")
        return lines or ["There is neither a rule nor a reward model to say."]

    @cached_property
    def reward_model(self) -> Any:
        """The run's reward model with its tokenizer, None if there is none that can be loaded."""
        for folder in sorted(self.site.run.glob("[0-9]*_reward*")):
            try:
                if is_reward_model(load_config(str(folder))):
                    return load_model(str(folder), "RUN", reward=True)
            except (UserError, OSError, ValueError):
                continue
        return None


def place(vote: Vote) -> str:
    """Return the choice of a vote by the order in which its annotator saw the answers."""
    choice = str(vote["choice"])
    return {vote["shown_first"]: "first", votes.OTHER[vote["shown_first"]]: "second"}.get(choice, choice)


def _as_seen(vote: Vote, first: str) -> str:
    return {first: "A", votes.OTHER[first]: "B"}.get(vote["choice"], str(vote["choice"]))
