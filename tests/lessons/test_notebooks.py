"""Each notebook runs from its first to its last cell, its exercises can be solved, and wrong solutions are noticed."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbclient.exceptions import CellExecutionError

from lessons import execute
from lessons.course import RUN_VARIABLE, SMOKE_VARIABLE
from lessons.execute import FOLDER, code_digest, exercise_of, read_notebook, read_sections
from tests.helpers import fresh

WRONG = Path(__file__).parent / "wrong_solutions"
NAMES = execute.notebook_names()
EXERCISES = ["exercise-1", "exercise-2", "exercise-3"]
LARGEST_OUTPUTS = 300_000
"""Bytes of all outputs of a notebook, so that GitHub shows it."""


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps a stage, which the notebooks find in their environment."""
    run = execute.make_miniature(tmp_path_factory.mktemp("miniature"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RUN_VARIABLE, str(run))
        patch.setenv(SMOKE_VARIABLE, "1")
        # A kernel that Jupyter starts has not inherited what our import sets.
        for variable in fresh.OURS:
            patch.delenv(variable, raising=False)
        yield run


def digests(run: Path) -> dict[str, str]:
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_what_its_code_prints(name: str) -> None:
    notebook = read_notebook(name)
    assert notebook.metadata["fourstage"]["code"] == code_digest(name), f"run `python -m lessons.execute {name}` again"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(output.output_type == "stream" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs), "there is no plot"
    assert not any(output.output_type == "error" for output in outputs)
    assert len(str(outputs)) <= LARGEST_OUTPUTS


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_three_exercises_and_five_questions_with_folded_answers(name: str) -> None:
    cells = read_notebook(name).cells
    exercises = [exercise_of(cell) for cell in cells if cell.cell_type == "code"]
    assert [exercise for exercise in exercises if exercise] == EXERCISES
    for number, exercise in enumerate(exercises):
        assert exercise is None or "assert" in [cell for cell in cells if cell.cell_type == "code"][number + 1].source
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert text.count("<details>") == text.count("</details>") == 5
    assert set(read_sections(FOLDER / "solutions" / f"{name}.py")) == set(EXERCISES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_beside_a_run_that_it_does_not_change(name: str, miniature: Path) -> None:
    """Wrong solutions are in `wrong_solutions/NAME.py`, three for each exercise: `# %% exercise-1: what is wrong`."""
    original = digests(miniature)
    notebook = execute.with_solutions(read_notebook(name), read_sections(FOLDER / "solutions" / f"{name}.py"))
    wrong = read_sections(WRONG / f"{name}.py")
    unnoticed = []
    client = execute.kernel_client(notebook)
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            exercise = exercise_of(cell)
            attempts = {title: code for title, code in wrong.items() if exercise and title.startswith(exercise)}
            assert exercise is None or len(attempts) == 3
            right = cell.source
            for title, code in attempts.items():
                cell.source = code
                try:
                    client.execute_cell(cell, index)
                    client.execute_cell(notebook.cells[index + 1], index + 1)
                    unnoticed.append(title)
                except CellExecutionError as error:
                    assert error.ename == "AssertionError", f"{title}: {error}"
            cell.source = right
            client.execute_cell(cell, index)
    assert not unnoticed
    assert digests(miniature) == original
