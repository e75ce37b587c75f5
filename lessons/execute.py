"""Execute the notebooks with their solutions, and keep what they show.

    python -m lessons.execute                    # all, at full size: writes the outputs into the notebooks
    python -m lessons.execute 1_pretraining      # one of them
    python -m lessons.execute --smoke            # beside a miniature run that it makes; writes nothing

A notebook ends with exercises. A cell with the tag `exercise-1` is what a student begins with, and the next one asserts
that it was solved. When a notebook is executed, such a cell is replaced by its solution, which
`lessons/solutions/NAME.py` has under the line `# %% exercise-1`; readers see the original cell, without output. The
metadata of a notebook say from which code its outputs come, so that a test notices if the code has changed.
"""

import argparse
import base64
import copy
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

from lessons.course import ROOT, RUN_VARIABLE, SMOKE_VARIABLE

FOLDER = Path(__file__).parent
SECTION = "# %% "
"""Begins a line that names the exercise of what follows, in a file of solutions."""
CELL_SECONDS = 1800
"""Limit of one cell. A whole notebook takes at most ten minutes on two cores."""


def notebook_names() -> list[str]:
    """Return the names of the notebooks, without `.ipynb`, in the order of the course."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read_notebook(name: str) -> NotebookNode:
    """Read a notebook of this folder."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def read_sections(path: Path) -> dict[str, str]:
    """Return the code under each line that begins with `# %% `, by the rest of this line."""
    sections: dict[str, str] = {}
    title = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(SECTION):
            title = line.removeprefix(SECTION).strip()
            sections[title] = ""
        elif title is not None:
            sections[title] += line + "\n"
    return {title: code.strip() for title, code in sections.items()}


def exercise_of(cell: NotebookNode) -> str | None:
    """Return the tag of an exercise's cell, such as `exercise-1`, or None for another cell."""
    for tag in cell.metadata.get("tags", []):
        if tag.startswith("exercise-"):
            return tag
    return None


def code_digest(name: str) -> str:
    """Return a digest of the code in a notebook and in its solutions."""
    sources = [cell.source for cell in read_notebook(name).cells if cell.cell_type == "code"]
    sources += read_sections(FOLDER / "solutions" / f"{name}.py").values()
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def with_solutions(notebook: NotebookNode, solutions: dict[str, str]) -> NotebookNode:
    """Return a copy of a notebook whose exercises are solved."""
    solved = copy.deepcopy(notebook)
    for cell in solved.cells:
        exercise = exercise_of(cell)
        if exercise is not None:
            cell.source = solutions[exercise]
    return solved


def kernel_client(notebook: NotebookNode) -> NotebookClient:
    """Return a client that executes a notebook in its own folder, as Jupyter does."""
    resources = {"metadata": {"path": str(FOLDER)}}
    return NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=resources)


def keep_outputs(notebook: NotebookNode, executed: NotebookNode) -> None:
    """Copy the outputs of an executed notebook, except those of exercises and of the cells that check them."""
    exercise = None
    for cell, result in zip(notebook.cells, executed.cells, strict=True):
        if cell.cell_type != "code":
            continue
        is_check = exercise is not None
        exercise = exercise_of(cell)
        cell.outputs = []
        cell.execution_count = None
        if exercise is None and not is_check:
            cell.outputs = [_with_small_image(output) for output in result.outputs if not _is_warning(output)]
            cell.execution_count = result.execution_count
        cell.metadata.pop("execution", None)


def _is_warning(output: NotebookNode) -> bool:
    """Return whether an output is what a library printed to stderr, such as a progress bar."""
    return output.output_type == "stream" and output.name == "stderr"


def _with_small_image(output: NotebookNode) -> NotebookNode:
    """Return an output with at most 64 colours in its image: a plot looks the same in a third of the bytes."""
    if "image/png" not in output.get("data", {}):
        return output
    image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
    content = io.BytesIO()
    image.quantize(64).save(content, "PNG", optimize=True)
    output.data["image/png"] = base64.b64encode(content.getvalue()).decode()
    return output


def execute(name: str) -> float:
    """Execute a notebook with its solutions, write its outputs into it, and return the seconds that it took."""
    notebook = read_notebook(name)
    solved = with_solutions(notebook, read_sections(FOLDER / "solutions" / f"{name}.py"))
    start = time.monotonic()
    kernel_client(solved).execute()
    seconds = time.monotonic() - start
    if SMOKE_VARIABLE not in os.environ:
        keep_outputs(notebook, solved)
        notebook.metadata["fourstage"] = {"code": code_digest(name), "seconds": round(seconds)}
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
    return seconds


def make_miniature(folder: Path) -> Path:
    """Take a miniature of pocket through two steps of every stage, and return its run."""
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "recipes" / "pocket"), "--smoke"]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return folder / "runs" / "pocket-smoke"


def main() -> int:
    """Execute notebooks, and return 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=notebook_names(), help="notebooks; default: all")
    parser.add_argument("--smoke", action="store_true", help="with a miniature of the run; write nothing")
    args = parser.parse_args()
    for name in args.names:
        if name not in notebook_names():
            parser.error(f"{name}: is not one of {', '.join(notebook_names())}")
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            os.environ[SMOKE_VARIABLE] = "1"
            if RUN_VARIABLE not in os.environ:
                os.environ[RUN_VARIABLE] = str(make_miniature(Path(scratch)))
        for name in args.names:
            try:
                seconds = execute(name)
            except CellExecutionError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
            print(f"{name}: {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
