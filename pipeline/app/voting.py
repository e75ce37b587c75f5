"""Prefer: which of two answers is better? The server side of the section where people vote.

    page    POST /prefer/next            which pair?
    server  the pair that this page has, or the annotator's first one without a vote, or a new one
    page    POST /prefer/vote            "the first one is better", again until it is confirmed
    server  appends the vote to votes/votes.jsonl, then answers with the next pair

A pair comes without the names of its models. The opinions of the simulated annotators and the reward model are revealed
only once the annotator has voted on the pair.
"""

import logging
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import krippendorff
from datasets import Dataset
from fastapi import APIRouter, Depends, HTTPException, Request
from markdown_it import MarkdownIt
from markupsafe import Markup
from pydantic import BaseModel, Field

from pipeline.app.pairs import SAMPLING, Pair, Pairs, Source
from pipeline.app.prompts import settings_of
from pipeline.app.site import Site
from pipeline.data.arguments import DataArguments
from pipeline.data.splits import load_splits
from pipeline.data.votes import CHOICES, OTHER, Conflict, Vote, VoteLog, update_data_set, votes_step
from pipeline.errors import Problem, UserError, as_typed
from pipeline.evaluation.evaluate_yaml import SOURCE_FIELDS, VOTES
from pipeline.files import read_run
from pipeline.models.loading import load_model
from pipeline.preferences.judges import match_by_taste, score
from pipeline.report.load import win_rates
from pipeline.report.text import number, visible
from pipeline.rewards.grading import is_gradable

logger = logging.getLogger(__name__)

LONGEST = 200_000
"""Maximum number of characters of a text that the page shows."""
FEW_SHARED = 20
"""Minimum number of pairs with votes from several people for which their agreement is reported."""
NAME = Field(default="", max_length=80)
ID = Field(pattern=r"^[\w-]{1,64}$")


class Page(BaseModel):
    """A page in a browser: its visitor, its id, and the models whose answers it compares."""

    annotator: str = NAME
    page: str = ID
    a: str = NAME
    b: str = NAME


class Ballot(Page):
    """A vote: `choice` refers to the order of the answers on the page, or is null to take back the vote `undoes`."""

    vote: str = ID
    pair: str = ID
    choice: str | None = Field(pattern=r"^(first|second|tie|bad|skip)$")
    undoes: str | None = Field(default=None, max_length=64)
    seconds: float | None = Field(default=None, ge=0, le=1e9)
    comment: str = Field(default="", max_length=5000)


class Typed(Page):
    text: str = Field(min_length=1)


def content(site: Site) -> dict[str, Any]:
    guidelines = site.options.guidelines or files(__package__) / "static" / "guidelines.md"
    # Without raw HTML and images, nothing in the file acts on the page or is fetched from elsewhere.
    markdown = MarkdownIt("commonmark", {"html": False}).disable("image")
    text = Markup(markdown.render(guidelines.read_text(encoding="utf-8")))
    models = {"models": site.models.names, "chosen": compared_models(site)}
    return {"guidelines": text, **models, "shows_rates": site.is_private}


def routes(site: Site) -> APIRouter:
    voting = Voting(site)
    router = APIRouter(prefix="/prefer", on_shutdown=[voting.close], dependencies=[Depends(report_full_disk)])
    answers: list[Callable[..., Any]] = [voting.next, voting.prompt, voting.vote, voting.state, voting.votes]
    # Show the results so far only on a page that no one else can open.
    answers += [voting.opinions, *([voting.rates] if site.is_private else [])]
    for answer in answers:
        router.add_api_route(f"/{answer.__name__}", answer, methods=["POST"])
    return router


def report_full_disk() -> Iterator[None]:
    """Make the page repeat a request if its pair or vote could not be written."""
    try:
        yield
    except OSError as error:
        raise HTTPException(507, f"The disk cannot be written to ({error.strerror or error}).") from None


def compared_models(site: Site) -> Source:
    """Return the models of `--pair`, or the model of the run's step for votes, or the one of instruction tuning."""
    names, pair = site.models.names, site.options.pair or ()
    if unknown := [name for name in pair if name not in names]:
        raise UserError(Problem("--pair", unknown[0], f"is not a model of the page; choose from: {', '.join(names)}"))
    if pair:
        return pair[0], pair[-1]
    asked = str(votes_step(site.run).get("model_name_or_path") or "")
    # Also match by the folder's name, because the run may have been moved since its record was written.
    wanted = [name for name in (asked, Path(asked).name) if name in names]
    tuned = [*wanted, *(name for name in names if "_sft" in name), names[-1]][0]
    return tuned, tuned


class Voting:
    """The votes on the pairs of a run; each public method answers the page's request of its name."""

    def __init__(self, site: Site) -> None:
        self.site, self.source, self.folder = site, compared_models(site), site.run / VOTES
        self.log = VoteLog(self.folder)
        # The command line takes precedence over the run's step for votes, and both over the defaults.
        step = votes_step(site.run)
        sampling = dict(SAMPLING)
        for given in (step, vars(site.options)):
            sampling |= {name: given[name] for name in SAMPLING if given.get(name) is not None}
        # The prompts of `--prompts`, or the ones that the run's stage 3 is trained on.
        source = {"dataset_name": site.options.prompts}
        if not site.options.prompts:
            recorded = settings_of(site.run)["trained_on"].get("prompts") or {}
            source = {k: v for k, v in recorded.items() if k in SOURCE_FIELDS and k != "grade"}
        prompts: Sequence[Mapping[str, Any]] = ()
        try:
            if source:
                found, _ = load_splits(DataArguments(**source), "prompt", evaluation=False)
                # From a stream, take as many as people could ever see.
                prompts = found if isinstance(found, Dataset) else list(found.take(10_000))
        except UserError:
            # Without the data of the run, prompts can still be typed.
            if site.options.prompts:
                raise
        self.pairs = Pairs(self.folder / "pairs.jsonl", site.models, prompts, sampling, site.options.overlap)
        self.goal: int | None = step.get("min_votes")
        recipe = read_run(site.run).get("recipe")
        self.command = as_typed("run", recipe) if recipe and step else ""
        # The pair that each page shows, by annotator and page.
        self._open: dict[tuple[str, str], Pair] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def close(self) -> None:
        """Write the data set of the votes for other tools; this project's own readers bring it up to date."""
        try:
            if self.log.valid_votes():
                update_data_set(self.folder)
        # The votes themselves are safe in the log.
        except (OSError, UserError) as error:
            logger.warning("The data set of the votes cannot be written (%s).", error)
        self.log.close()

    def next(self, request: Request, page: Page, have: str = "") -> dict[str, Any]:
        """Return the pair that a page shows; `have` is the id of the one that it has shown so far."""
        identify(request, page)
        return self._answer(page, lambda: self._choose(page, have))

    def prompt(self, request: Request, typed: Typed) -> dict[str, Any]:
        identify(request, typed)
        return self._answer(typed, lambda: self.pairs.typed(typed.annotator, self._source_of(typed), typed.text))

    def vote(self, request: Request, ballot: Ballot) -> dict[str, Any]:
        """Record a vote, which is then on disk, and return the next pair."""
        identify(request, ballot)
        name, pair = ballot.annotator, self._find(ballot.pair)
        # Another annotator may have seen the answers in the other order, in which "first" means the other one.
        allotted = self.pairs.sequence(name, (pair.model_a, pair.model_b))
        if pair not in allotted and not self.log.has_vote(name, pair.pair):
            raise HTTPException(410, "This pair was shown under another name; here is another one.")
        # The page knows the answers by their order, the log as `a` and `b`.
        first = pair.shown_first(name)
        vote = asdict(pair) | {
            "id": ballot.vote,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "annotator": name,
            "shown_first": first,
            "choice": {"first": first, "second": OTHER[first]}.get(ballot.choice or "", ballot.choice),
            **ballot.model_dump(include={"undoes", "seconds", "comment"}),
        }
        del vote["rule"]
        refused = ""
        try:
            self.log.add(vote)
            # If others can open the page, it hides win rates, and the terminal shows them every ten votes.
            if not self.site.is_private and len(self.log.valid_votes()) % 10 == 0:
                print(*self.rates(), sep="\n", flush=True)
        except Conflict as error:
            refused = f"Not counted: {error}."
        # A pair whose vote was taken back is shown again.
        return {**self._answer(ballot, lambda: self._choose(ballot, ballot.pair)), "refused": refused}

    def state(self, request: Request, page: Page) -> dict[str, Any]:
        """Return what the page says about the votes so far, without revealing how others voted."""
        identify(request, page)
        return self._summary(page.annotator)

    def votes(self, request: Request, page: Page) -> list[dict[str, Any]]:
        """Return an annotator's newest votes, the newest first and shortened."""
        identify(request, page)
        known = [vote for vote in self.log.valid_votes(page.annotator) if vote["pair"] in self.pairs.by_id]
        listed = []
        for vote in known[:-201:-1]:
            first = vote["shown_first"]
            texts = {"prompt": vote["prompt"][-1]["content"], "comment": vote.get("comment") or ""}
            texts |= {"first": vote[first], "second": vote[OTHER[first]]}
            shown = {name: visible(text, 300) for name, text in texts.items()}
            listed.append({"vote": vote["id"], "pair": vote["pair"], "choice": as_shown(vote, first), **shown})
        return listed

    def opinions(self, request: Request, page: Page, pair: str) -> list[str]:
        """Return what others would have said about a pair that has the annotator's vote, one line each."""
        identify(request, page)
        voted, lines = self._find(pair), []
        if not self.log.has_vote(page.annotator, pair):
            raise HTTPException(403, "Vote first.")
        first = voted.shown_first(page.annotator)
        texts, names = ([getattr(voted, of + side) for side in (first, OTHER[first])] for of in ("", "model_"))
        if is_gradable(voted.rule):
            (outcome,) = match_by_taste(texts[:1], texts[1:], [{**voted.rule, "prompt": voted.prompt}])
            preferred = {1.0: "A", 0.0: "B", 0.5: "neither"}[outcome]
            lines.append(f"The simulated annotators, without noise, would have preferred {preferred}.")
        if self.reward_model is not None:
            conversations = [[*voted.prompt, {"role": "assistant", "content": text}] for text in texts]
            a, b = score(*self.reward_model, conversations)
            lines.append(f"The reward model scores A {a:+.2f} and B {b:+.2f}.")
        votes = [vote for vote in self.log.valid_votes() if vote["pair"] == pair]
        if others := [as_shown(vote, first) for vote in votes if vote["annotator"] != page.annotator]:
            counts = f"{others.count('first')} A, {others.count('second')} B"
            lines.append(f"Of {len(others)} other people who saw this pair: {counts}.")
        return [*lines, f"A was written by {names[0]}, B by {names[1]}."]

    @cached_property
    def reward_model(self) -> Any:
        """The run's reward model with its tokenizer, None if none can be loaded."""
        for folder in sorted(self.site.run.glob("[0-9]*_reward*")):
            with suppress(UserError, OSError, ValueError):
                return load_model(str(folder), "RUN", reward=True)
        return None

    def _find(self, pair: str) -> Pair:
        if pair not in self.pairs.by_id:
            raise HTTPException(410, "This pair is no longer known; here is another one.")
        return self.pairs.by_id[pair]

    def _source_of(self, page: Page) -> Source:
        chosen = page.a or self.source[0], page.b or self.source[1]
        if not set(chosen) <= set(self.site.models.names):
            raise HTTPException(422, "This page has no such model.")
        return chosen

    def _answer(self, page: Page, find: Callable[[], Pair]) -> dict[str, Any]:
        """Return the pair that `find` returns, without the names of its models, or why there is none."""
        name = page.annotator
        try:
            # If a person has two pages open, the second waits until the first has its pair.
            with self._locks[name]:
                pair = self._open[name, page.page] = find()
        except UserError as error:
            return {"pair": {"error": visible(str(error), 1000)}, "state": self._summary(name)}
        turns = [{"role": visible(one["role"], 40), "content": visible(one["content"], LONGEST)} for one in pair.prompt]
        first = pair.shown_first(name)
        texts = {"first": getattr(pair, first), "second": getattr(pair, OTHER[first])}
        answers = {place: visible(text, LONGEST) for place, text in texts.items()}
        return {"pair": {"pair": pair.pair, "prompt": turns, **answers}, "state": self._summary(name)}

    def _choose(self, page: Page, have: str) -> Pair:
        """Return the pair `have`, or else the annotator's first one that is free and has no vote, or a new one."""
        name, source = page.annotator, self._source_of(page)
        # Copied, because pages of other people may come and go during the loop.
        places = list(self._open.items())
        elsewhere = {pair.pair for (person, other), pair in places if person == name and other != page.page}
        sequence = self.pairs.sequence(name, source)
        own = [pair for pair in sequence if pair.pair == have]
        free = [pair for pair in sequence if pair.pair not in elsewhere]
        without_vote = (pair for pair in own + free if not self.log.has_vote(name, pair.pair))
        return next(without_vote, None) or self.pairs.allot(name, source)

    def _summary(self, annotator: str) -> dict[str, Any]:
        standing = self.log.valid_votes()
        own = [vote for vote in standing if vote["annotator"] == annotator]
        seconds = [vote["seconds"] for vote in own[-20:] if vote.get("seconds")]
        usable, people = sum(vote["choice"] in OTHER for vote in standing), {vote["annotator"] for vote in standing}
        counts = {"count": len(own), "all": len(standing), "usable": usable, "people": len(people), "goal": self.goal}
        pace = round(median(seconds), 1) if seconds else None
        return {"annotator": annotator, **counts, "pace": pace, "command": self.command}

    def rates(self) -> list[str]:
        """Return which model is preferred, and how far people agree, one line each."""
        lines = []
        for name, rate in win_rates(self.site.run, self.source[0], []).items():
            # A single tie has no interval: anything is possible.
            for opponent, one in (rate.by_kind or {f"against {self.source[0]}": rate}).items():
                low, high = (number(100 * end, 0) for end in (one.low or 0.0, one.high or 1.0))
                said = f"preferred in {100 * one.value:.0f}% ({low} to {high}) of {one.n} votes"
                lines.append(f"{name} {opponent}: {said}")
        if not lines:
            lines = ["no votes between two different models yet; choose two below, or start the page with --pair"]
        alpha, shared = agreement(self.log.valid_votes())
        if shared >= FEW_SHARED and not math.isnan(alpha):
            said = f"Krippendorff's alpha {number(alpha, 2)} (1 is perfect, 0 is chance)"
            lines.append(f"agreement on {shared} shared pairs: {said}")
        return [visible(line) for line in lines]


def identify(request: Request, page: Page) -> None:
    """Give a page the name of the login or, without a login, the name that was typed."""
    name = getattr(request.state, "annotator", None) or page.annotator
    page.annotator = visible(" ".join(name.split()), 80) or "anonymous"


def as_shown(vote: Vote, first: str) -> str:
    """Return the choice of a vote in the order shown, answer `first` first: "first", "second", "tie", ..."""
    return str({first: "first", OTHER[first]: "second"}.get(vote["choice"], vote["choice"]))


def agreement(votes: Sequence[Vote]) -> tuple[float, int]:
    """Return Krippendorff's alpha of the votes on shared pairs, which may be NaN, and the number of these pairs."""
    by_pair: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if vote["choice"] != "skip":
            by_pair[vote["pair"]][vote["choice"]] += 1
    shared = [counts for counts in by_pair.values() if counts.total() > 1]
    # Without two different choices, there is no disagreement that chance could explain.
    if len({choice for counts in shared for choice in counts}) < 2:
        return math.nan, len(shared)
    table = [[counts[choice] for choice in CHOICES] for counts in shared]
    return float(krippendorff.alpha(value_counts=table, level_of_measurement="nominal")), len(shared)
