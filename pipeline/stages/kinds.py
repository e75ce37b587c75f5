"""The types of the tables in `pipeline/stages/__init__.py`, where titles, charts, smoke settings and cards are."""

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

    # One sentence on what happens; the model's input; what changes its weights.
    about: str
    goes_in: str
    trains: str
    # The steps within it, as (name, what happens). A stage's kind as the name adds its figure.
    parts: tuple[tuple[str, str], ...] = ()
    # Name of its drawing in path.html.jinja, "" for none.
    drawing: str = ""
    # Section of the page, and part of the report, that it links to.
    section: str = "compare"
    place: str = "answers"
    # Other kinds that it represents.
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """What a model card says about the stage, and the tags of the repository."""

    summary: str = "A model."
    how: str = "As below."
    limit: str = "Its limits are not known."
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageKind:
    """A kind of step."""

    # Its display name, "" if the report does not mention it, and the algorithm, which follows the name in titles.
    name: str = ""
    method: str = ""
    # Module of the recipe, run with `python -m`. A kind without a recipe is only measured.
    module: str = ""
    # Seconds that it takes in recipes/pocket, for estimates of the time left until a run has its own.
    seconds: float = 6.0
    # Whether it runs under `accelerate launch`, with the requested number of processes; writes a model, which is then
    # evaluated; takes a seed; and writes data, which people may correct by hand.
    launched: bool = False
    measured: bool = False
    seeded: bool = True
    editable: bool = False
    # Whether its model is trained; writes text (unlike a reward model); and answers questions (unlike a base model).
    trained: bool = True
    generates: bool = True
    chats: bool = True
    # Whether it may start from random weights; samples answers; trains a critic; and waits for people's votes.
    from_scratch: bool = False
    samples: bool = False
    has_critic: bool = False
    by_people: bool = False
    # Kind whose YAML file it uses if it has none of its own; fixed name of its output directory, or "".
    file_of: str = ""
    directory: str = ""
    # Function that checks its settings beyond their types, `(settings) -> list of problems`.
    check: str = ""
    # Content of the rows that it reads, and the key of `HELD_OUT` that its own data are used for.
    data: Literal["text", "conversation", "preference", "unpaired", "prompt", ""] = ""
    held_out: Literal["text", "instructions", "problems", "prompts", "pairs", ""] = ""
    # Field that limits the length of its texts or answers, in tokens.
    length: str = ""
    # Metrics that it is trained to improve, the main one first.
    aims: tuple[str, ...] = ()
    # Settings that `--smoke` overrides.
    smoke: Mapping[str, Any] = field(default_factory=dict)
    charts: tuple[LoggedChart, ...] = ()
    box: Box | None = None
    # Text of the page about its rollouts, "" if they cannot be watched.
    watch: str = ""
    card: Card = Card()

    @property
    def title(self) -> str:
        """The name with the algorithm, such as "Reasoning (GRPO)"."""
        return f"{self.name} ({self.method})" if self.method else self.name


@dataclass(frozen=True)
class HeldOutData:
    """Data that stages are measured on."""

    # Content of the rows, as in `StageKind.data`, and prefixes of the metrics that are measured on it.
    data: Literal["text", "conversation", "preference", "prompt"]
    metrics: tuple[str, ...]
    # Configuration of the data set that `recipes.data` writes, "" for none.
    config: str = ""
    # Field of the stages that limits the length of an answer, "" if models do not answer these rows.
    length: str = ""


@dataclass(frozen=True)
class Baseline:
    """A baseline: what the opponent reaches by a trick without training, see `pipeline.evaluation.baselines`."""

    # Its title in the report, which is followed by its texts. `{against}` is the opponent.
    title: str
    # Its description in a model card, with `{against}` and `{text}`.
    card: str
    # Whether the verdict names a stage that does not beat it.
    is_bar: bool = True
