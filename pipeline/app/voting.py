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
from pipeline.app.prompts import evaluation_settings
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
from pipeline.stages import stage_order

logger = logging.getLogger(__name__)

LONGEST = 200_000
"""Maximum number of characters of a text that the page shows."""
LISTED = 200
"""Maximum number of votes of an annotator that the page lists."""
STREAMED_PROMPTS = 10_000
"""Prompts that are read from a stream, more than people will ever see."""
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


class TypedPrompt(Page):
    """A prompt that an annotator has typed."""

    text: str = Field(min_length=1)


def content(site: Site) -> dict[str, Any]:
    """Return the variables of this section's template."""
    guidelines = site.options.guidelines or files(__package__) / "static" / "guidelines.md"
    # Without raw HTML and images, nothing in the file acts on the page or is fetched from elsewhere.
    markdown = MarkdownIt("commonmark", {"html": False}).disable("image")
    text = Markup(markdown.render(guidelines.read_text(encoding="utf-8")))
    return {
        "guidelines": text,
        "models": site.models.names,
        "chosen": compared_models(site),
        "shows_rates": site.is_private,
    }


def routes(site: Site) -> APIRouter:
    """Return the routes that this section requests, named after the methods of `Voting`."""
    voting = Voting(site)
    router = APIRouter(prefix="/prefer", on_shutdown=[voting.close], dependencies=[Depends(report_full_disk)])
    methods: list[Callable[..., Any]] = [
        voting.next,
        voting.prompt,
        voting.vote,
        voting.state,
        voting.votes,
        voting.opinions,
    ]
    # Show the results so far only on a page that no one else can open.
    if site.is_private:
        methods.append(voting.rates)
    for method in methods:
        router.add_api_route(f"/{method.__name__}", method, methods=["POST"])
    return router


def report_full_disk() -> Iterator[None]:
    """Make the page repeat a request if its pair or vote could not be written."""
    try:
        yield
    except OSError as error:
        raise HTTPException(507, f"The disk cannot be written to ({error.strerror or error}).") from None


def compared_models(site: Site) -> Source:
    """Return the models of `--pair`, or the model of the run's step for votes, or the one of instruction tuning.

    A run without any of these has its last model.

    Raises:
        UserError: If `--pair` names a model that the page does not have.
    """
    names = site.models.names
    pair = site.options.pair
    if pair:
        for name in pair:
            if name not in names:
                remedy = f"is not a model of the page; choose from: {', '.join(names)}"
                raise UserError(Problem("--pair", name, remedy))
        return pair[0], pair[-1]
    voted_on = str(votes_step(site.run).get("model_name_or_path") or "")
    # Also match by the folder's name, because the run may have been moved since its record was written.
    candidates = [voted_on, Path(voted_on).name]
    candidates += [name for name in names if "_sft" in name]
    for name in candidates:
        if name in names:
            return name, name
    return names[-1], names[-1]


def load_prompts(site: Site) -> Sequence[Mapping[str, Any]]:
    """Return the rows of `--prompts`, or those that the run's stage 3 is trained on.

    Return () if the run has no such data or they cannot be read: prompts can still be typed.

    Raises:
        UserError: If the data of `--prompts` cannot be read.
    """
    source = {"dataset_name": site.options.prompts}
    if not site.options.prompts:
        trained_on = evaluation_settings(site.run).facts.trained_on.get("prompts") or {}
        source = {key: value for key, value in trained_on.items() if key in SOURCE_FIELDS and key != "grade"}
    if not source:
        return ()
    try:
        prompts, _ = load_splits(DataArguments(**source), "prompt", evaluation=False)
        if isinstance(prompts, Dataset):
            return prompts
        return list(prompts.take(STREAMED_PROMPTS))
    except UserError:
        if site.options.prompts:
            raise
        return ()


class Voting:
    """The votes on the pairs of a run; each public method answers the page's request of its name."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.source = compared_models(site)
        self.folder = site.run / VOTES
        self.log = VoteLog(self.folder)
        step = votes_step(site.run)
        # The command line takes precedence over the run's step for votes, and both over the defaults.
        sampling = dict(SAMPLING)
        for settings in (step, vars(site.options)):
            for name in SAMPLING:
                if settings.get(name) is not None:
                    sampling[name] = settings[name]
        prompts = load_prompts(site)
        self.pairs = Pairs(self.folder / "pairs.jsonl", site.models, prompts, sampling, site.options.overlap)
        # The number of usable votes for which the run waits, None if it does not.
        self.goal: int | None = step.get("min_votes")
        # The command that resumes the run, "" if it has no step for votes.
        self.command = ""
        recipe = read_run(site.run).get("recipe")
        if recipe and step:
            self.command = as_typed("run", recipe)
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
        set_annotator(request, page)
        return self._answer(page, lambda: self._choose(page, have))

    def prompt(self, request: Request, typed: TypedPrompt) -> dict[str, Any]:
        """Return a pair of answers to a prompt that an annotator has typed."""
        set_annotator(request, typed)
        source = self._source_of(typed)
        return self._answer(typed, lambda: self.pairs.assign_typed(typed.annotator, source, typed.text))

    def vote(self, request: Request, ballot: Ballot) -> dict[str, Any]:
        """Record a vote, which is then on disk, and return the next pair."""
        set_annotator(request, ballot)
        annotator = ballot.annotator
        pair = self._find(ballot.pair)
        # The visitor may have changed the name meanwhile. Another name may see the answers in the other order, so that
        # "first" means the other one.
        sequence = self.pairs.sequence(annotator, (pair.model_a, pair.model_b))
        if pair not in sequence and not self.log.has_vote(annotator, pair.pair):
            raise HTTPException(410, "This pair was shown under another name; here is another one.")
        # The page calls the answers "first" and "second", the log "a" and "b".
        first = pair.shown_first(annotator)
        choice = ballot.choice
        if choice == "first":
            choice = first
        elif choice == "second":
            choice = OTHER[first]
        vote = asdict(pair) | {
            "id": ballot.vote,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "annotator": annotator,
            "shown_first": first,
            "choice": choice,
            "undoes": ballot.undoes,
            "seconds": ballot.seconds,
            "comment": ballot.comment,
        }
        # pairs.jsonl has the rule, which lines of votes.jsonl do not need.
        del vote["rule"]
        conflict = ""
        try:
            self.log.add(vote)
            # If others can open the page, it hides win rates, and the terminal shows them every ten votes.
            if not self.site.is_private and len(self.log.valid_votes()) % 10 == 0:
                print(*self.rates(), sep="\n", flush=True)
        except Conflict as error:
            conflict = f"Not counted: {error}."
        # A pair whose vote was taken back is shown again.
        answer = self._answer(ballot, lambda: self._choose(ballot, ballot.pair))
        return {**answer, "refused": conflict}

    def state(self, request: Request, page: Page) -> dict[str, Any]:
        """Return what the page says about the votes so far, without revealing how others voted."""
        set_annotator(request, page)
        return self._summary(page.annotator)

    def votes(self, request: Request, page: Page) -> list[dict[str, Any]]:
        """Return an annotator's newest votes, the newest first and shortened."""
        set_annotator(request, page)
        votes = [vote for vote in self.log.valid_votes(page.annotator) if vote["pair"] in self.pairs.by_id]
        listed = []
        for vote in reversed(votes[-LISTED:]):
            first = vote["shown_first"]
            listed.append(
                {
                    "vote": vote["id"],
                    "pair": vote["pair"],
                    "choice": choice_by_order(vote, first),
                    "prompt": visible(vote["prompt"][-1]["content"], 300),
                    "comment": visible(vote.get("comment") or "", 300),
                    "first": visible(vote[first], 300),
                    "second": visible(vote[OTHER[first]], 300),
                }
            )
        return listed

    def opinions(self, request: Request, page: Page, pair: str) -> list[str]:
        """Return what others would have said about a pair that has the annotator's vote, one line each."""
        set_annotator(request, page)
        voted = self._find(pair)
        if not self.log.has_vote(page.annotator, pair):
            raise HTTPException(403, "Vote first.")
        # The page calls the answers A and B in the order in which this annotator saw them.
        first = voted.shown_first(page.annotator)
        second = OTHER[first]
        answer_a = getattr(voted, first)
        answer_b = getattr(voted, second)
        lines = []
        if is_gradable(voted.rule):
            (outcome,) = match_by_taste([answer_a], [answer_b], [{**voted.rule, "prompt": voted.prompt}])
            preferred = {1.0: "A", 0.0: "B", 0.5: "neither"}[outcome]
            lines.append(f"The simulated annotators, without noise, would have preferred {preferred}.")
        if self.reward_model is not None:
            conversations = [[*voted.prompt, {"role": "assistant", "content": text}] for text in (answer_a, answer_b)]
            score_a, score_b = score(*self.reward_model, conversations)
            lines.append(f"The reward model scores A {score_a:+.2f} and B {score_b:+.2f}.")
        choices = []
        for vote in self.log.valid_votes():
            if vote["pair"] == pair and vote["annotator"] != page.annotator:
                choices.append(choice_by_order(vote, first))
        if choices:
            counts = f"{choices.count('first')} A, {choices.count('second')} B"
            lines.append(f"Of {len(choices)} other people who saw this pair: {counts}.")
        model_a = getattr(voted, f"model_{first}")
        model_b = getattr(voted, f"model_{second}")
        return [*lines, f"A was written by {model_a}, B by {model_b}."]

    @cached_property
    def reward_model(self) -> Any:
        """The run's reward model with its tokenizer, None if none can be loaded."""
        for folder in sorted(self.site.run.glob("[0-9]*_reward*"), key=lambda folder: stage_order(folder.name)):
            with suppress(UserError, OSError, ValueError):
                return load_model(str(folder), "RUN", reward=True)
        return None

    def _find(self, pair: str) -> Pair:
        """Return the pair with this id, or answer with status 410."""
        if pair not in self.pairs.by_id:
            raise HTTPException(410, "This pair is no longer known; here is another one.")
        return self.pairs.by_id[pair]

    def _source_of(self, page: Page) -> Source:
        """Return the models that a page compares, or answer with status 422 if it may not choose them."""
        source = page.a or self.source[0], page.b or self.source[1]
        if not set(source) <= set(self.site.models.names):
            raise HTTPException(422, "This page has no such model.")
        return source

    def _answer(self, page: Page, find: Callable[[], Pair]) -> dict[str, Any]:
        """Return the pair that `find` returns, without the names of its models, or why there is none."""
        name = page.annotator
        try:
            # If a person has two pages open, the second waits until the first has its pair.
            with self._locks[name]:
                pair = self._open[name, page.page] = find()
        except UserError as error:
            return {"pair": {"error": visible(str(error), 1000)}, "state": self._summary(name)}
        turns = []
        for turn in pair.prompt:
            turns.append({"role": visible(turn["role"], 40), "content": visible(turn["content"], LONGEST)})
        first = pair.shown_first(name)
        content = {
            "pair": pair.pair,
            "prompt": turns,
            "first": visible(getattr(pair, first), LONGEST),
            "second": visible(getattr(pair, OTHER[first]), LONGEST),
        }
        return {"pair": content, "state": self._summary(name)}

    def _choose(self, page: Page, current: str) -> Pair:
        """Return the pair to show on a page, which the annotator has not voted on.

        The first of these that exists:

        1. the pair that the page shows already, whose id is `current` ("" if there is none)
        2. the first pair of the annotator's sequence that is on no other page of the same person
        3. a new pair
        """
        annotator = page.annotator
        source = self._source_of(page)
        on_other_pages = set()
        # Copied, because pages of other people may come and go during the loop.
        for (person, page_id), pair in list(self._open.items()):
            if person == annotator and page_id != page.page:
                on_other_pages.add(pair.pair)
        sequence = self.pairs.sequence(annotator, source)
        candidates = [pair for pair in sequence if pair.pair == current]
        candidates += [pair for pair in sequence if pair.pair not in on_other_pages]
        for pair in candidates:
            if not self.log.has_vote(annotator, pair.pair):
                return pair
        return self.pairs.assign_next(annotator, source)

    def _summary(self, annotator: str) -> dict[str, Any]:
        """Return the number of votes of an annotator and of all, and what the page needs to say about them."""
        votes = self.log.valid_votes()
        votes_of_annotator = [vote for vote in votes if vote["annotator"] == annotator]
        seconds = [vote["seconds"] for vote in votes_of_annotator[-20:] if vote.get("seconds")]
        pace = None
        if seconds:
            pace = round(median(seconds), 1)
        return {
            "annotator": annotator,
            "count": len(votes_of_annotator),
            "all": len(votes),
            "usable": sum(vote["choice"] in OTHER for vote in votes),
            "people": len({vote["annotator"] for vote in votes}),
            "goal": self.goal,
            "pace": pace,
            "command": self.command,
        }

    def rates(self) -> list[str]:
        """Return which model is preferred, and how far people agree, one line each."""
        lines = []
        for name, rate in win_rates(self.site.run, self.source[0], []).items():
            rates_by_opponent = rate.by_kind or {f"against {self.source[0]}": rate}
            for opponent, estimate in rates_by_opponent.items():
                # A single tie has no interval: anything is possible.
                low = number(100 * (estimate.low or 0.0), 0)
                high = number(100 * (estimate.high or 1.0), 0)
                share = f"{100 * estimate.value:.0f}% ({low} to {high})"
                lines.append(f"{name} {opponent}: preferred in {share} of {estimate.n} votes")
        if not lines:
            lines = ["no votes between two different models yet; choose two below, or start the page with --pair"]
        alpha, shared_pairs = agreement(self.log.valid_votes())
        if shared_pairs >= FEW_SHARED and not math.isnan(alpha):
            agreed = f"Krippendorff's alpha {number(alpha, 2)} (1 is perfect, 0 is chance)"
            lines.append(f"agreement on {shared_pairs} shared pairs: {agreed}")
        return [visible(line) for line in lines]


def set_annotator(request: Request, page: Page) -> None:
    """Give a page the name of the login or, without a login, the name that was typed."""
    name = getattr(request.state, "annotator", None) or page.annotator
    page.annotator = visible(" ".join(name.split()), 80) or "anonymous"


def choice_by_order(vote: Vote, first: str) -> str:
    """Return the choice of a vote as "first", "second", "tie", "bad" or "skip", where answer `first` is the first."""
    choice = str(vote["choice"])
    if choice == first:
        return "first"
    if choice == OTHER[first]:
        return "second"
    return choice


def agreement(votes: Sequence[Vote]) -> tuple[float, int]:
    """Return Krippendorff's alpha of the votes on shared pairs, which may be NaN, and the number of these pairs."""
    by_pair: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if vote["choice"] != "skip":
            by_pair[vote["pair"]][vote["choice"]] += 1
    shared = [counts for counts in by_pair.values() if counts.total() > 1]
    choices: set[str] = set()
    for counts in shared:
        choices |= counts.keys()
    # Without two different choices, there is no disagreement that chance could explain.
    if len(choices) < 2:
        return math.nan, len(shared)
    table = [[counts[choice] for choice in CHOICES] for counts in shared]
    return float(krippendorff.alpha(value_counts=table, level_of_measurement="nominal")), len(shared)
