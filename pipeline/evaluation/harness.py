"""Tasks of lm-evaluation-harness, which `evaluate RUN --stage 2_sft --lm_eval_tasks piqa` measures (extra `[eval]`).

They use lm-eval's defaults, so `lm-eval run --model_args pretrained=RUN/2_sft,dtype=float32 --tasks piqa` gives the
same values. The metric `acc_norm` of the task `piqa` is recorded as `piqa:acc_norm`; if a task extracts answers in
several ways, the name says which, as in `gsm8k:exact_match,strict-match`. A group's tasks are its kinds.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from pipeline import hardware
from pipeline.errors import Problem, UserError, is_network_error
from pipeline.evaluation import intervals
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.likelihood import MAX_LOGITS
from pipeline.evaluation.results import StageResult
from pipeline.tools.chat_model import ChatModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

FIELD = "lm_eval_tasks"


@cache
def find_tasks(tasks: tuple[str, ...]) -> tuple[TaskManager, dict[str, list[str]]]:
    """Return lm-eval's index, and the names in it of each task: several for a name with wildcards, or none."""
    from lm_eval.tasks import TaskManager

    files = {task: Path(task).resolve() for task in tasks if task.endswith(".yaml") and Path(task).is_file()}
    # lm-eval opens a task by its path. A group may name tasks of its folder and lm-eval's own, indexed in seconds.
    groups = [path for path in files.values() if re.search("^group:", path.read_text(encoding="utf-8"), re.MULTILINE)]
    defaults = bool(groups) or len(files) < len(tasks)
    index = TaskManager(include_path=[path.parent for path in groups], include_defaults=defaults)
    names = {entry.yaml_path: name for name, entry in index.task_index.items()}
    own = {task: [names.get(path, str(path))] for task, path in files.items()}
    return index, {task: own.get(task) or index.match_tasks([task]) for task in tasks}


def check_tasks(tasks: Sequence[str]) -> list[Problem]:
    """Check that lm-eval is installed and knows the tasks. Their data are not checked here."""
    if tasks and find_spec("lm_eval") is None:
        return [Problem(FIELD, ", ".join(tasks), "lm-eval is not installed; `pip install lm-eval`, or omit this")]
    remedy = "is neither a name that `lm-eval ls tasks` lists nor a YAML file; correct it"
    found = find_tasks(tuple(tasks))[1] if tasks else {}
    return [Problem(FIELD, task, remedy) for task in tasks if not found[task]]


def measure_tasks(result: StageResult, chat: ChatModel, tasks: Sequence[str], limit: int | None) -> None:
    """Record every metric of tasks that `check_tasks` accepts, on their first `limit` examples if it is given.

    A mean over examples is recorded with each of them, and has an interval like the project's own metrics. Any other
    figure, such as a group's, gets an interval from lm-eval's standard error. A UserError is raised if a task cannot be
    loaded or measured, for instance because the Hub does not answer.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # lm-eval warns about every model that is already loaded.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    index, found = find_tasks(tuple(tasks))
    # lm-eval computes the logits of a whole batch: at most 8 requests on a CPU, as many as fit on an accelerator.
    vocabulary: int = chat.model.config.get_text_config().vocab_size
    batch_size = "auto" if hardware.accelerator() else max(1, min(8, MAX_LOGITS // (1024 * vocabulary)))
    try:
        measured = simple_evaluate(
            HFLM(pretrained=chat.model, tokenizer=chat.tokenizer, batch_size=batch_size),
            tasks=[name for names in found.values() for name in names],
            task_manager=index,
            limit=limit,
            bootstrap_iters=intervals.RESAMPLES,
        )
    # Tasks are third-party code: they, their data and their templates may raise anything.
    except Exception as error:
        reason = f"lm-eval cannot measure it ({shorten(str(error) or repr(error), 250)})"
        if is_network_error(error) or isinstance(error, ConnectionError):
            reason = "its data are not in the cache, and the Hub cannot be reached; check the network (HF_HUB_OFFLINE?)"
        raise UserError(Problem(FIELD, ", ".join(tasks), reason)) from error

    # A group is recorded with its tasks as kinds, which then have no metrics of their own.
    parts = {group: measured["group_subtasks"][group] for group in measured.get("groups", {})}
    inner = {part for found in parts.values() for part in found}
    estimates: dict[str, dict[str, Estimate]] = defaultdict(dict)
    for task, figures in measured["results"].items():
        for key, value in figures.items():
            metric, comma, way = key.partition(",")
            number, stderr = intervals.finite(value), intervals.finite(figures.get(f"{metric}_stderr,{way}"))
            if comma and not metric.endswith("_stderr") and number is not None:
                half = None if stderr is None else intervals.Z * stderr
                low, high = (None, None) if half is None else (number - half, number + half)
                n = figures.get("sample_count", {}).get(key, figures.get("sample_len"))
                estimates[task][key] = Estimate(number, low, high, n)
    for task in [*measured["samples"], *parts]:
        for key, estimate in estimates[task].items() if task not in inner else ():
            # A slash in the name would mean a baseline.
            name = f"{task}:{key.removesuffix(',none')}".replace("/", "_")
            kinds = {part: estimates[part][key] for part in parts.get(task, ()) if key in estimates[part]}
            result.metrics[name] = replace(estimate, by_kind=kinds)
            if task not in parts:
                _use_examples(result, name, task, key, measured["samples"][task])


def _use_examples(result: StageResult, name: str, task: str, key: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """Record a metric with its examples if it is their mean; otherwise, only with an interval."""
    estimate, (metric, _, way) = result.metrics[name], key.partition(",")
    samples = [item for item in samples if item["filter"] == way and metric in item]
    values = [item[metric] for item in samples]
    if values and all(isinstance(value, Real) for value in values) and _same(fmean(values), estimate.value):
        rows = [{"id": item["doc_id"], "kind": task, "document": item["doc_hash"]} for item in samples]
        result.record(name, values, rows)
    elif values and all(isinstance(value, tuple | list) and len(value) == 2 for value in values):
        # Log-likelihoods, and numbers of words or bytes, from which perplexities and bits per byte are computed.
        mean = intervals.ratio([value[0] for value in values], [value[1] for value in values], result.seed)
        for shown in (lambda x: math.exp(-x), lambda x: -x / math.log(2)):
            if _same(shown(mean.value), estimate.value) and mean.low is not None and mean.high is not None:
                result.metrics[name] = replace(estimate, low=shown(mean.high), high=shown(mean.low))


_same = partial(math.isclose, rel_tol=1e-6, abs_tol=1e-9)
