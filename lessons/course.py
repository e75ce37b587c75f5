"""What every notebook begins with: a finished run of pocket to look at, and a folder of the notebook's own to write to.

    from lessons.course import begin_lesson

    lesson = begin_lesson("1_pretraining")
    AutoModelForCausalLM.from_pretrained(lesson.run / "2_sft")

No notebook changes the run. `python -m lessons.execute --smoke` executes the notebooks with a miniature of a run. Its
models have learned nothing, so that only a few steps are trained, and nothing that a model should know is asserted.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# First of all, because it sets variables that torch and transformers read when they are imported.
import pipeline  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
RUN_VARIABLE = "FOURSTAGE_LESSON_RUN"
"""Environment variable with the folder of the run to look at. Default: `runs/pocket`, in the folder of the project."""
SMOKE_VARIABLE = "FOURSTAGE_LESSON_SMOKE"
"""Environment variable that is set, to anything, if the run is a miniature."""


@dataclass(frozen=True)
class Lesson:
    """What a notebook works with.

    Attributes:
        run: Folder of a finished run of pocket, with `0_random`, `1_pretrain`, `2_sft`, `3_reward`, `3_ppo`, `4_grpo`,
            `tokenizer` and `data`. It is only read.
        folder: An empty folder for what the notebook trains.
        is_smoke: Whether the run is a miniature.
    """

    run: Path
    folder: Path
    is_smoke: bool

    def steps(self, number: int, smoke: int = 2) -> int:
        """Return `number`, or `smoke` if the notebook is only tried out."""
        if self.is_smoke:
            return smoke
        return number


def begin_lesson(name: str) -> Lesson:
    """Find a finished run of pocket, or train one, and make an empty folder for the notebook.

    Args:
        name: Name of the notebook, such as `1_pretraining`. Its folder is `runs/lessons/NAME`, which is emptied.

    Raises:
        RuntimeError: The environment variable names a folder that is not a finished run, or the training failed.
    """
    run = find_run()
    if run is None:
        run = ROOT / "runs" / "pocket"
        print(f"There is no finished run in {run}. Training one takes about 8 minutes on two CPU cores ...", flush=True)
        command = [sys.executable, "-m", "pipeline", "run", "pocket"]
        if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode != 0:
            raise RuntimeError(f"`fourstage run pocket` failed; run it in {ROOT} to see why")
    folder = ROOT / "runs" / "lessons" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"The run: {_short(run)}. This notebook writes to {_short(folder)}.")
    return Lesson(run, folder, is_smoke=SMOKE_VARIABLE in os.environ)


def find_run() -> Path | None:
    """Return the folder of a finished run of pocket, the first seed of several, or None if there is none.

    Raises:
        RuntimeError: The environment variable names a folder that is not a finished run.
    """
    named = os.environ.get(RUN_VARIABLE)
    if named is not None:
        if not is_finished(Path(named)):
            raise RuntimeError(f"{RUN_VARIABLE}: {named} is not a finished run of pocket")
        return Path(named).resolve()
    pocket = ROOT / "runs" / "pocket"
    for run in (pocket, *sorted(pocket.glob("seed*"))):
        if is_finished(run):
            return run
    return None


def is_finished(run: Path) -> bool:
    """Return whether a run has gone through stage 4 and been measured."""
    record = run / "run.json"
    if not record.is_file():
        return False
    steps = json.loads(record.read_text(encoding="utf-8")).get("steps", {})
    return "4_grpo" in steps and all(step.get("finished_at") for step in steps.values())


def _short(path: Path) -> Path:
    """Return a path in the project's folder without this folder."""
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT)
    return path
