"""The report of a run in whose files any value is of another type: a note at most, and never a traceback."""

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.differences import check_rows, compare, differences, format_table, note_other_settings
from pipeline.report.load import load_run
from pipeline.report.page import page_content, render
from pipeline.report.seeds import write_seeds
from pipeline.report.summary import summarise
from tests.helpers.fake_run import write_run

OTHER = [-1.5, 10**400, "text", None, [], [1], {"a": [1]}]
"""What each value is replaced by."""
ESTIMATE = {"value": 0.5, "ci95": [0.25, 0.75], "n": 8}
METRICS = ("pass@1", "win_rate", "expert_load")
LOGGED = {
    "step": 1,
    "epoch": 0.5,
    "loss": 2.0,
    "eval_loss": 2.0,
    "num_tokens": 8,
    "train_runtime": 3.0,
    "alarm/kl": 1.0,
}
LOGGED |= {"router/layer_0/expert_0": 1.0, "router/layer_0/entropy": 0.5, "learning_rate": 1e-3}
CONTENT: dict[str, dict[str, Any]] = {
    "evaluations/STAGE.json": {
        "metrics": dict.fromkeys(METRICS, ESTIMATE) | {"elicited/pass@1": ESTIMATE | {"by_kind": {"a": ESTIMATE}}},
        "answers": [{"prompt": "Who?", "answer": "A fox."}],
        "traces": [{"kind": "sums", "problem": "1 + 1?", "reference": "2", "answer": "2", "correct": True}],
        "texts": {"elicited": {"text": "Working:"}},
        "opponent": "0123",
        "against": "2_sft",
        "judge": "gpt",
        "left_out": ["pass@8: not measured"],
        "cut_off": {"problems": {"answers": 8, "cut off": 2, "limit": 64}},
        "experts": {"layers": [[0.5, 1.5]], "documents": [{"pieces": ["a", "b"], "chosen": [[0, 1]]}]},
        "overlap": {"problems": {"rows": 8, "found": 4, "trained_on": 80, "n": 8, "in": {"text": 4}}},
        "settings": {"samples": 8},
        "seconds": 3.0,
    },
    "evaluations/STAGE.jsonl": {
        "metric": "pass@1",
        "id": 1,
        "row": "a",
        "kind": "sums",
        "value": 1.0,
        "weight": 2.0,
        "length": 3,
    },
    "STAGE/trainer_state.json": {
        "global_step": 8,
        "total_flos": 1e12,
        "num_input_tokens_seen": 80,
        "log_history": [LOGGED, LOGGED | {"step": 2}],
    },
    "STAGE/config.json": {
        "model_type": "mixtral",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a JSON value, itself included."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """Return a copy of a JSON value with another value at a path."""
    if not path:
        return other
    copy = deepcopy(value)
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = other
    return copy


def build(run_dir: Path, output: Path) -> list[str]:
    """Compare a run with itself, and write its report, alone and over seeds. Return its notes."""
    run = load_run(run_dir)
    pairs = [(run, run)]
    check_rows(pairs)
    note_other_settings(pairs)
    format_table(pairs, compare(pairs))
    changes = differences(run)
    content = page_content(run, summarise(run, changes, []), changes)
    render("report.html.jinja", content)
    render("report.md.jinja", content)
    write_seeds([run, run], [changes, changes], [], output)
    return run.notes


def write(run: Path, file: str, content: Any) -> list[str]:
    """Write a file of two stages, which have the same. Return the paths."""
    paths = [run / file.replace("STAGE", stage) for stage in ("1_pretrain", "2_sft")]
    for path in paths:
        path.write_text(json.dumps(content) + "\n")
    return list(map(str, paths))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stages have everything that an evaluation and a training may write."""
    run = write_run(tmp_path_factory.mktemp("runs") / "run", stages=("1_pretrain", "2_sft"), examples=8)
    for file, content in CONTENT.items():
        write(run, file, content)
    assert build(run, run / "report") == []
    return run


@pytest.mark.parametrize("file", CONTENT)
def test_a_value_of_another_type_is_a_note_at_most(measured: Path, tmp_path: Path, file: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(measured, run)
    failures = []
    for path in places(CONTENT[file]):
        for other in OTHER:
            damaged = write(run, file, replaced(CONTENT[file], path, other))
            try:
                notes = build(run, tmp_path / "report")
            except Exception as error:  # noqa: BLE001 - any is a failure
                failures.append(f"{path} = {str(other)[:20]}: {type(error).__name__}: {error}")
            else:
                assert all(note.startswith(tuple(damaged)) for note in notes)
    assert not failures, "\n".join(failures)
