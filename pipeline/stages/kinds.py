"""What `pipeline.stages` says about each kind of step: the types of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class LoggedChart:
    """A chart of what a stage logs while it trains.

    Attributes:
        title: What is drawn.
        lines: Name and logged key of each line.
        note: A sentence about how to read it, or "".
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    note: str = ""


@dataclass(frozen=True)
class Box:
    """A box in the picture of the path from random weights to reasoning.

    Attributes:
        about: What happens, in one sentence.
        goes_in: What the model is given.
        trains: What changes its weights.
        parts: The steps within it, as (name, what happens). The kind of a stage in place of a name adds its figure.
        drawing: Name of its drawing in path.html.jinja, "" for none.
        section: Section of the page that it leads to.
        place: Part of the report that it leads to.
        others: Other kinds that it stands for.
    """

    about: str
    goes_in: str
    trains: str
    parts: tuple[tuple[str, str], ...] = ()
    drawing: str = ""
    section: str = "compare"
    place: str = "answers"
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """What the card of a model says about its stage.

    Attributes:
        summary: What the model is, in one or two sentences.
        how: How it was trained.
        limit: What it cannot do.
        tags: Tags of its repository.
    """

    summary: str = "A model."
    how: str = "As below."
    limit: str = "Its limits are not known."
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageKind:
    """A kind of step.

    Attributes:
        name: Its name for people, "" if the report does not mention it.
        method: Abbreviation of its algorithm, which follows the name in titles.
        module: Recipe, which is run with `python -m`. A kind without a recipe is only measured.
        seconds: Time that it takes in recipes/pocket. Before a run has times of its own, the time left is estimated
            from these proportions.
        launched: Whether it runs under `accelerate launch`, on the requested number of processes.
        measured: Whether it writes a model, which is then evaluated.
        seeded: Whether it draws random numbers and takes a seed.
        editable: Whether it writes data, which people may correct by hand.
        trained: Whether its model has taken training steps.
        generates: Whether its model writes text. A reward model does not.
        chats: Whether its model answers questions. A base model only continues a text.
        from_scratch: Whether it may start from random weights.
        samples: Whether it samples answers.
        has_critic: Whether it trains a critic with the model, against reward models.
        by_people: Whether it waits for people's votes.
        file_of: Kind whose YAML file configures it, if it has none of its own.
        directory: Name that its output directory must have, "" for any.
        check: Function that checks its settings beyond their types, `(settings) -> list of problems`.
        data: What the rows that it reads contain.
        held_out: Key of `HELD_OUT` that its own data serve as.
        length: Field that limits the length of its texts or of its answers, in tokens.
        aims: Metrics that it is trained to improve, the main one first.
        smoke: Settings that `--smoke` overrides.
        charts: Charts of what it logs.
        box: Its box in the path, if it has one.
        watch: What the page says about its rollouts, "" if they cannot be watched.
        card: What its model card says.
    """

    name: str = ""
    method: str = ""
    module: str = ""
    seconds: float = 6.0
    launched: bool = False
    measured: bool = False
    seeded: bool = True
    editable: bool = False
    trained: bool = True
    generates: bool = True
    chats: bool = True
    from_scratch: bool = False
    samples: bool = False
    has_critic: bool = False
    by_people: bool = False
    file_of: str = ""
    directory: str = ""
    check: str = ""
    data: Literal["text", "conversation", "preference", "unpaired", "prompt", ""] = ""
    held_out: Literal["text", "instructions", "problems", "prompts", "pairs", ""] = ""
    length: str = ""
    aims: tuple[str, ...] = ()
    smoke: Mapping[str, Any] = field(default_factory=dict)
    charts: tuple[LoggedChart, ...] = ()
    box: Box | None = None
    watch: str = ""
    card: Card = Card()

    @property
    def title(self) -> str:
        """The name with the algorithm, such as "Reasoning (GRPO)"."""
        return f"{self.name} ({self.method})" if self.method else self.name

    @property
    def figure(self) -> str:
        """Its main metric, which the terminal shows."""
        return self.aims[0] if self.aims else "bits_per_byte"


@dataclass(frozen=True)
class HeldOutData:
    """Data that stages are measured on.

    Attributes:
        data: What the rows contain, as in `StageKind.data`.
        metrics: How the names of the metrics begin that are measured on it.
        config: Configuration of the data set that `recipes.data` writes, "" for none.
        length: Field of these stages that limits the length of an answer, "" if models do not answer it.
    """

    data: Literal["text", "conversation", "preference", "prompt"]
    metrics: tuple[str, ...]
    config: str = ""
    length: str = ""


@dataclass(frozen=True)
class Baseline:
    """What the opponent reaches by a trick that needs no training; see `pipeline.evaluation.baselines`.

    Attributes:
        title: Its name in the report, to which the texts of its answers are appended. `{against}` is the opponent.
        card: Its description in a model card, with `{against}` and `{text}`.
        is_bar: Whether the verdict names a stage that does not beat it.
    """

    title: str
    card: str
    is_bar: bool = True
