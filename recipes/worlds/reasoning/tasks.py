"""The tasks of a mix: the field `tasks` of a YAML file, and their problems.

reasoning-gym draws problem number `i` of a data set from `seed + i`, so two data sets only have different problems if
their seeds lie further apart than the sets are long. Each pool of problems here has its own range of `SEEDS`.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from pipeline.errors import Problem
from pipeline.files import as_list

POOLS = ("train", "validation", "test", "sft", "pretrain")
"""Sets of problems that do not share seeds."""
SEEDS = 10_000_000
"""Number of seeds of a pool."""
BLOCK = 1_000
"""Problems of one of reasoning-gym's data sets; some data sets draw all of them at once."""
Entry = dict[str, Any]
"""A problem as reasoning-gym makes it: `question`, `answer` and `metadata`."""


class Grade(NamedTuple):
    """A task at one difficulty."""

    task: str
    # Its share of the mix, in proportion to the others.
    weight: float
    # Fields of the task's configuration.
    settings: Mapping[str, Any]

    def entries(self, seed: int, pool: str) -> Iterator[Entry]:
        """Endlessly yield the task's problems of a pool; `metadata` has the seed of each."""
        from reasoning_gym.factory import create_dataset

        first = (seed * len(POOLS) + POOLS.index(pool)) * SEEDS
        for start in range(first, first + SEEDS, BLOCK):
            block = create_dataset(self.task, seed=start, size=BLOCK, **self.settings)
            for index in range(BLOCK):
                entry = block[index]
                yield {**entry, "metadata": {**entry["metadata"], "seed": start + index}}


def to_row(task: str, entry: Entry) -> dict[str, Any]:
    """Return a problem as a row of the data set."""
    metadata = json.dumps(entry["metadata"], default=_as_json)
    prompt = [{"role": "user", "content": entry["question"].strip()}]
    return {"prompt": prompt, "answer": str(entry["answer"]), "metadata": metadata, "kind": task}


def _as_json(value: Any) -> Any:
    """Return NumPy's scalars and arrays as values of JSON, and anything else that JSON lacks as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read_tasks(tasks: Any) -> tuple[list[Grade], list[Problem]]:
    """Read the field `tasks`: a mapping from the name of each task to its settings, or to a list of such settings.

    Settings are fields of the task's configuration, `weight` (default: 1) and `level`: a level of the task's curriculum
    from 0, the easiest, or a list of levels, which share the weight. Return the grades, and all problems.
    """
    if find_spec("reasoning_gym") is None:
        remedy = "needs reasoning-gym, which is not installed; pip install 'fourstage[reasoning]'"
        return [], [Problem("tasks", ", ".join(map(str, tasks)), remedy)]
    if not isinstance(tasks, Mapping) or not tasks:
        return [], [Problem("tasks", tasks, "must be a mapping from the names of tasks to their settings")]
    grades: list[Grade] = []
    problems: list[Problem] = []
    for name, listed in tasks.items():
        for settings in as_list(listed):
            try:
                # An error drops the grades of the levels before it, too; the problem ends the program anyway.
                grades += _read_grades(str(name), settings or {})
            # Each task checks its settings in its own way.
            except Exception as error:  # noqa: BLE001
                problems.append(_task_problem(str(name), settings or {}, error))
    return grades, problems


def _read_grades(task: str, settings: Mapping[str, Any]) -> list[Grade]:
    """Read the settings of a task, with a grade for each level; raise any exception if they are wrong."""
    from reasoning_gym.factory import create_curriculum, create_dataset

    weight = settings.get("weight", 1)
    if not weight > 0:
        raise ValueError("the weight must be above 0")
    fields = {name: value for name, value in settings.items() if name not in ("level", "weight")}
    # One None without a level.
    levels = as_list(settings.get("level"))
    grades = []
    for level in levels:
        values = fields
        if level is not None:
            curriculum = create_curriculum(task)
            curriculum.set_global_level(level)
            of_level = vars(curriculum.generate_configuration())
            values = {name: value for name, value in of_level.items() if name not in ("seed", "size")} | fields
        # Some settings are only checked when a problem is drawn.
        create_dataset(task, seed=0, size=BLOCK, **values)[0]
        grades.append(Grade(task, weight / len(levels), values))
    return grades


def _task_problem(task: str, settings: Mapping[str, Any], error: Exception) -> Problem:
    """Return the problem for a task that is unknown, or whose settings raise an error."""
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        nearest = difflib.get_close_matches(task, DATASETS, n=1)
        if nearest:
            return Problem("tasks", task, f"is unknown; did you mean {nearest[0]}?")
    reason = f"{type(error).__name__}: {error}"
    return Problem("tasks", task, f"is unknown or refuses its settings, {settings!r:.60} ({reason})")
