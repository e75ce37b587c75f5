"""Tasks of lm-evaluation-harness, which `evaluate RUN --stage 2_sft --lm_eval_tasks piqa` measures (extra `[eval]`).

A task, a group or a tag is named as `lm-eval ls tasks` lists it, or by the path of a YAML file of your own. It is
measured with lm-eval's defaults: with as many examples in the prompt as the task's file says, and without a chat
template. So lm-eval's own command gives the same values:

    lm-eval run --model_args pretrained=RUN/2_sft,dtype=float32 --tasks piqa

The metric `acc_norm` of the task `piqa` is recorded as `piqa:acc_norm`; if a task extracts answers in several ways, the
name says which, as in `gsm8k:exact_match,strict-match`. A group's tasks are its kinds.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import chain
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
    """Return lm-eval's index of tasks, and the names in the index that each task stands for.

    A task with wildcards stands for several names, an unknown one for none: {"arc_*": ["arc_easy", "arc_challenge"]}.
    """
    from lm_eval.tasks import TaskManager

    files = {task: Path(task).resolve() for task in tasks if task.endswith(".yaml") and Path(task).is_file()}
    # lm-eval opens the file of a task by its path. A group may name other tasks, of its folder or of lm-eval itself, so
    # the folder is indexed, and so are lm-eval's own tasks, which takes seconds.
    groups = [path for path in files.values() if re.search("^group:", path.read_text(encoding="utf-8"), re.MULTILINE)]
    defaults = bool(groups) or len(files) < len(tasks)
    index = TaskManager(include_path=[path.parent for path in groups], include_defaults=defaults)
    names_of_files = {entry.yaml_path: name for name, entry in index.task_index.items()}
    names: dict[str, list[str]] = {}
    for task in tasks:
        if task in files:
            names[task] = [names_of_files.get(files[task], str(files[task]))]
        else:
            names[task] = index.match_tasks([task])
    return index, names


def check_tasks(tasks: Sequence[str]) -> list[Problem]:
    """Check that lm-eval is installed and has the tasks. Their data are not checked here."""
    if not tasks:
        return []
    if find_spec("lm_eval") is None:
        return [Problem(FIELD, ", ".join(tasks), "lm-eval is not installed; `pip install lm-eval`, or omit this")]
    _, names = find_tasks(tuple(tasks))
    remedy = "is neither a name that `lm-eval ls tasks` lists nor a YAML file; correct it"
    return [Problem(FIELD, task, remedy) for task in tasks if not names[task]]


def measure_tasks(result: StageResult, chat: ChatModel, tasks: Sequence[str], limit: int | None) -> None:
    """Record every metric of tasks that `check_tasks` accepts, on their first `limit` examples if it is given.

    A mean over examples is recorded with each of them, and has an interval like the project's own metrics. Any other
    metric, such as a group's, gets an interval from lm-eval's standard error.

    Raises:
        UserError: If a task cannot be loaded or measured, for instance because the Hub does not answer.
    """
    measured = _evaluate(chat, tasks, limit)
    estimates = {task: _estimates(figures) for task, figures in measured["results"].items()}
    # A group is recorded with its tasks as kinds, which then have no metrics of their own.
    subtasks = {group: measured["group_subtasks"][group] for group in measured.get("groups", {})}
    tasks_of_groups = set(chain.from_iterable(subtasks.values()))
    for task in [*measured["samples"], *subtasks]:
        if task in tasks_of_groups:
            continue
        for key, estimate in estimates.get(task, {}).items():
            # A slash in the name would mean a baseline.
            name = f"{task}:{key.removesuffix(',none')}".replace("/", "_")
            kinds = {}
            for part in subtasks.get(task, ()):
                if key in estimates.get(part, {}):
                    kinds[part] = estimates[part][key]
            result.metrics[name] = replace(estimate, by_kind=kinds)
            if task not in subtasks:
                _estimate_from_examples(result, name, task, key, measured["samples"][task])


def _evaluate(chat: ChatModel, tasks: Sequence[str], limit: int | None) -> Mapping[str, Any]:
    """Return what lm-eval measures.

    Returns:
        `results` are the metrics of each task and group, `samples` the examples of each task, and `group_subtasks` the
        tasks of each group.

    Raises:
        UserError: If lm-eval fails.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # lm-eval warns about every model that is already loaded.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    index, names = find_tasks(tuple(tasks))
    # lm-eval computes the logits of a whole batch: at most 8 requests on a CPU, as many as fit on an accelerator.
    vocabulary: int = chat.model.config.get_text_config().vocab_size
    batch_size = "auto" if hardware.accelerator() else max(1, min(8, MAX_LOGITS // (1024 * vocabulary)))
    try:
        return simple_evaluate(
            HFLM(pretrained=chat.model, tokenizer=chat.tokenizer, batch_size=batch_size),
            tasks=list(chain.from_iterable(names.values())),
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


def _estimates(figures: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return the metrics of a task or a group, with the intervals that follow from lm-eval's standard errors.

    `figures` are, for instance, `{"acc,none": 0.6, "acc_stderr,none": 0.02, "sample_len": 500, "alias": "piqa"}`, where
    "none" is the way in which answers are extracted.
    """
    estimates = {}
    for key, figure in figures.items():
        metric, comma, way = key.partition(",")
        value = intervals.finite(figure)
        if not comma or metric.endswith("_stderr") or value is None:
            continue
        n = figures.get("sample_count", {}).get(key, figures.get("sample_len"))
        error = intervals.finite(figures.get(f"{metric}_stderr,{way}"))
        if error is None:
            estimates[key] = Estimate(value, n=n)
        else:
            estimates[key] = Estimate(value, value - intervals.Z * error, value + intervals.Z * error, n)
    return estimates


def _estimate_from_examples(
    result: StageResult, name: str, task: str, key: str, samples: Sequence[Mapping[str, Any]]
) -> None:
    """Replace a recorded metric by an estimate from lm-eval's examples, if they give the same value.

    A mean over examples is recorded with the examples. A perplexity, or a number of bits per byte, only gets another
    interval. Any other metric stays as it is.

    Args:
        result: Where the metric is recorded.
        name: Name of the metric in `result`.
        task: Name of the task.
        key: lm-eval's name of the metric, such as "acc,none".
        samples: Examples of the task, for all ways of extracting answers.
    """
    estimate = result.metrics[name]
    metric, _, way = key.partition(",")
    samples = [item for item in samples if item["filter"] == way and metric in item]
    values = [item[metric] for item in samples]
    if not values:
        return
    if all(isinstance(value, Real) for value in values) and _are_close(fmean(values), estimate.value):
        rows = [{"id": item["doc_id"], "kind": task, "document": item["doc_hash"]} for item in samples]
        result.record(name, values, rows)
    elif all(isinstance(value, tuple | list) and len(value) == 2 for value in values):
        # The values are pairs: the log-likelihood of a document in nats, and its number of words or bytes. From their
        # mean, lm-eval computes a perplexity or bits per byte, both of which fall as the log-likelihood rises.
        mean = intervals.ratio([value[0] for value in values], [value[1] for value in values], result.seed)
        for formula in (_perplexity, _bits):
            if _are_close(formula(mean.value), estimate.value) and mean.low is not None and mean.high is not None:
                result.metrics[name] = replace(estimate, low=formula(mean.high), high=formula(mean.low))


def _perplexity(log_likelihood: float) -> float:
    """Return the perplexity that follows from a mean log-likelihood in nats."""
    return math.exp(-log_likelihood)


def _bits(log_likelihood: float) -> float:
    """Return the negative of a mean log-likelihood in nats, in bits."""
    return -log_likelihood / math.log(2)


def _are_close(value: float, estimate: float) -> bool:
    """Return whether a value that was computed here is lm-eval's, up to rounding."""
    return math.isclose(value, estimate, rel_tol=1e-6, abs_tol=1e-9)
