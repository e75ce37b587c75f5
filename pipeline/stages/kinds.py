"""What `pipeline.stages` says about each kind of step: the types of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class LoggedChart:
    """A chart of what a stage logs: its title, the name and logged key of each line, and how to read it."""

    title: str
    lines: tuple[tuple[str, str], ...]
    note: str = ""


@dataclass(frozen=True)
class Box:
    """A box in the picture of the path from random weights to reasoning."""

    # What happens, in one sentence; what the model is given; what changes its weights.
    about: str
    goes_in: str
    trains: str
    # The steps within it, as (name, what happens). The kind of a stage in place of a name adds its figure.
    parts: tuple[tuple[str, str], ...] = ()
    # Name of its drawing in path.html.jinja, "" for none.
    drawing: str = ""
    # Section of the page, and part of the report, that it leads to.
    section: str = "compare"
    place: str = "answers"
    # Other kinds that it stands for.
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """What the card of a model says about its stage, and the tags of its repository."""

    summary: str = "A model."
    how: str = "As below."
    limit: str = "Its limits are not known."
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageKind:
    """A kind of step."""

    # Its name for people, "" if the report does not mention it, and the algorithm, which follows the name in titles.
    name: str = ""
    method: str = ""
    # Recipe, which is run with `python -m`. A kind without a recipe is only measured.
    module: str = ""
    # Time that it takes in recipes/pocket. Before a run has times of its own, the time left is estimated from these.
    seconds: float = 6.0
    # Whether it runs under `accelerate launch`, on the requested number of processes, writes a model, which is then
    # evaluated, draws random numbers and takes a seed, and writes data, which people may correct by hand.
    launched: bool = False
    measured: bool = False
    seeded: bool = True
    editable: bool = False
    # Whether its model has taken training steps, writes text (a reward model does not), and answers questions (a base
    # model only continues a text).
    trained: bool = True
    generates: bool = True
    chats: bool = True
    # Whether it may start from random weights, samples answers, trains a critic, and waits for people's votes.
    from_scratch: bool = False
    samples: bool = False
    has_critic: bool = False
    by_people: bool = False
    # Kind whose YAML file configures it, if it has none of its own; name of its output directory, "" for any.
    file_of: str = ""
    directory: str = ""
    # Function that checks its settings beyond their types, `(settings) -> list of problems`.
    check: str = ""
    # What the rows that it reads contain, and the key of `HELD_OUT` that its own data serve as.
    data: Literal["text", "conversation", "preference", "unpaired", "prompt", ""] = ""
    held_out: Literal["text", "instructions", "problems", "prompts", "pairs", ""] = ""
    # Field that limits the length of its texts or of its answers, in tokens.
    length: str = ""
    # Metrics that it is trained to improve, the main one first.
    aims: tuple[str, ...] = ()
    # Settings that `--smoke` overrides.
    smoke: Mapping[str, Any] = field(default_factory=dict)
    charts: tuple[LoggedChart, ...] = ()
    box: Box | None = None
    # What the page says about its rollouts, "" if they cannot be watched.
    watch: str = ""
    card: Card = Card()

    @property
    def title(self) -> str:
        """The name with the algorithm, such as "Reasoning (GRPO)"."""
        return f"{self.name} ({self.method})" if self.method else self.name


@dataclass(frozen=True)
class HeldOutData:
    """Data that stages are measured on."""

    # What the rows contain, as in `StageKind.data`, and how the names of the metrics begin that are measured on it.
    data: Literal["text", "conversation", "preference", "prompt"]
    metrics: tuple[str, ...]
    # Configuration of the data set that `recipes.data` writes, "" for none.
    config: str = ""
    # Field of these stages that limits the length of an answer, "" if models do not answer it.
    length: str = ""


@dataclass(frozen=True)
class Baseline:
    """What the opponent reaches by a trick that needs no training; see `pipeline.evaluation.baselines`."""

    # Its name in the report, to which the texts of its answers are appended. `{against}` is the opponent.
    title: str
    # Its description in a model card, with `{against}` and `{text}`.
    card: str
    # Whether the verdict names a stage that does not beat it.
    is_bar: bool = True
