"""The types of the tables in `pipeline/stages/__init__.py`, where titles, charts, smoke settings and cards are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class LoggedChart:
    """A chart of what a stage logs.

    Attributes:
        title: What it shows, with the unit.
        lines: The name of each line and the key under which the trainer logs it, such as ("validation", "eval_loss").
        note: How to read it, "" if that is clear.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    note: str = ""


@dataclass(frozen=True)
class Box:
    """A box in the picture of the path from random weights to reasoning.

    Attributes:
        about: One sentence on what happens.
        goes_in: What the model reads.
        trains: What changes its weights.
        parts: The steps within the box, as (name, what happens). If the name is a kind of stage, its metric is shown.
        drawing: Name of the drawing in path.html.jinja, "" for none.
        section: Section of the page that it links to.
        place: Part of the report that it links to.
    """

    about: str
    goes_in: str
    trains: str
    parts: tuple[tuple[str, str], ...] = ()
    drawing: str = ""
    section: str = "compare"
    place: str = "answers"


@dataclass(frozen=True)
class Card:
    """What a model card says about the stage, and the tags of the repository."""

    summary: str = "A model."
    how: str = "As below."
    limit: str = "Its limits are not known."
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageKind:
    """A kind of step: all that differs from one kind to another outside of its recipe.

    Attributes:
        name: Display name, "" if the report does not mention it.
        method: The algorithm, which follows the name in titles; "" if the name says it.
        module: Module of the recipe, run with `python -m`; "" for a kind that is only measured.
        trainer: The trainer that its recipe builds, as "module:class"; `trainer` in its YAML file may name a subclass.
            "" if it trains nothing.
        seconds: Duration in recipes/pocket, for estimates of the time left until a run has its own.
        launched: Whether it runs under `accelerate launch`, with the requested number of processes.
        measured: Whether it writes a model, which is then evaluated.
        seeded: Whether it has a seed.
        editable: Whether it writes data that people may correct by hand.
        trained: Whether its model is trained.
        generates: Whether its model writes text, unlike a reward model.
        chats: Whether its model answers questions, unlike a base model.
        from_scratch: Whether it may start from random weights.
        samples: Whether it samples answers.
        has_critic: Whether it trains a critic.
        by_people: Whether it waits for people's votes.
        file_of: Kind whose YAML file it uses if it has none of its own; "" for none.
        directory: Fixed name of its output directory; "" if the file chooses one.
        check: Function that checks its settings beyond their types, as "module:function". It gets the settings and
            returns a list of problems. "" for none.
        data: Content of the rows that it reads; "" if it reads none.
        held_out: Key of `HELD_OUT` that its own data are used for; "" for none.
        length: Field that limits the length of its texts or answers, in tokens; "" for none.
        aims: Metrics that it is trained to improve, the main one first. Preference tuning may have another one before
            them (`pipeline.preferences.aims`).
        remedy: What the verdict proposes if it missed its aims, in the imperative, without a full stop.
        smoke: Settings that `--smoke` overrides.
        charts: Charts of what it logs, in the order in which they are shown.
        box: Its box in the picture of the path, None if it has none of its own.
        box_of: Kind whose box stands for it if the run has no stage of that kind; "" for none.
        watch: Text of the page about its rollouts; "" if they cannot be watched. The page replays GRPO's and PPO's own
            trainers (`pipeline.app.watch`).
        card: What its model card says.
    """

    name: str = ""
    method: str = ""
    module: str = ""
    trainer: str = ""
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
    remedy: str = "train longer"
    smoke: Mapping[str, Any] = field(default_factory=dict)
    charts: tuple[LoggedChart, ...] = ()
    box: Box | None = None
    box_of: str = ""
    watch: str = ""
    card: Card = Card()

    @property
    def title(self) -> str:
        """The name with the algorithm, such as "Reasoning (GRPO)"."""
        if not self.method:
            return self.name
        return f"{self.name} ({self.method})"


@dataclass(frozen=True)
class HeldOutData:
    """Data that stages are measured on.

    Attributes:
        data: Content of the rows, as in `StageKind.data`.
        config: Configuration of the data set that `recipes.data` writes; "" for none.
        length: Field of the stages that limits the length of an answer; "" if models do not answer these rows.
    """

    data: Literal["text", "conversation", "preference", "prompt"]
    config: str = ""
    length: str = ""


@dataclass(frozen=True)
class Baseline:
    """What the opponent reaches by a trick without training, see `pipeline.evaluation.baselines`.

    Attributes:
        title: Title in the report, which is followed by the texts of the trick. `{against}` is the opponent.
        card: Description in a model card, with `{against}` and `{text}`.
        is_bar: Whether the verdict names a stage that does not beat it.
    """

    title: str
    card: str
    is_bar: bool = True
