"""Where the checks of `tests.benchmarks.gpu` run, and what they yield."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.helpers.sampling_recipes import write_config
from tests.helpers.small_model import recipe_command

ROOT = Path(__file__).parents[2]
CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
TRAINED = ("pretrain", "sft", "reward")


class Failed(Exception):
    """A program that a check started has failed."""


@dataclass(frozen=True)
class Line:
    """A figure: what it is, what was expected and measured, and whether they agree."""

    what: str
    expected: str
    measured: str
    agrees: bool


def at_most(what: str, measured: float, bound: float) -> Line:
    return Line(what, f"at most {bound:g}", f"{measured:.4g}", measured <= bound)


def at_least(what: str, measured: float, bound: float) -> Line:
    return Line(what, f"at least {bound:g}", f"{measured:.4g}", measured >= bound)


def equal(what: str, measured: object, expected: object) -> Line:
    return Line(what, str(expected), str(measured), measured == expected)


def contains(what: str, text: str, expected: str) -> Line:
    """Find a text in a log; measured is the log's line that begins as the text does."""
    begin = expected.split()[0]
    line = next((line for line in text.splitlines() if line.startswith(begin)), "nothing like it")
    return Line(what, expected, line, expected in text)


@dataclass
class Bench:
    """Where checks run.

    Attributes:
        output: Folder of everything that is written.
        gpus: GPUs of the machine.
        quick: Whether miniatures are enough.
        run: A run on pocket with `2_sft`, `3_reward` and `data`; None before there is one.
    """

    output: Path
    gpus: int
    quick: bool
    run: Path | None = None

    def folder(self, name: str) -> Path:
        """Return a folder for a run, without what an earlier attempt may have left there."""
        path = self.output / "runs" / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def python(
        self, name: str, *command: object, environment: Mapping[str, str] | None = None, fails: bool = False
    ) -> str:
        """Run `python COMMAND` to its end and return its log, which is also in `logs/NAME.log`.

        Raises:
            Failed: If its exit code is not 0, or is 0 although it should fail.
        """
        log = self.output / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        text = log.read_text(errors="replace")
        if (done.returncode != 0) != fails:
            raise Failed(f"exit code {done.returncode}, see {log}:\n{text[-1500:]}")
        return text

    def measure(self, name: str, *arguments: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return what a function of `tests.benchmarks.gpu_measure` measures."""
        file = self.output / f"{name}.pt"
        self.python(name, "-m", "tests.benchmarks.gpu_measure", name.split("-")[0], file, *arguments,
                    environment=environment)  # fmt: skip
        found: dict[str, Any] = torch.load(file, weights_only=True)
        return found

    def train(
        self, recipe: str, name: str, *options: object, processes: int = 1, file: str | None = None, **keywords: Any
    ) -> tuple[Path, str]:
        """Train a miniature of a recipe under `accelerate launch`; return its folder and its log."""
        folder = self.folder(f"{recipe}-{name}")
        launch = launcher(file or "accelerate_config.yaml", processes)
        command = [*launch, *self.options(recipe), *options, "--output_dir", folder]
        return folder, self.python(f"{recipe}-{name}", *command, **keywords)

    def options(self, recipe: str) -> list[str]:
        """Return `-m MODULE` and the options of a miniature; PPO's and GRPO's rollouts are fixed."""
        inputs = self.output / "inputs"
        inputs.mkdir(parents=True, exist_ok=True)
        if recipe in TRAINED:
            return recipe_command(recipe, inputs)
        more = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no"}
        return ["-m", f"recipes.{recipe}", *write_config(recipe, inputs, **more)]

    def start(self) -> Path:
        """Return the folder of a run with a policy and a reward model, trained on the CPU if there is none yet."""
        if self.run is not None:
            return self.run
        folder = self.output / "cpu"
        if self.quick:
            for recipe, stage in (("sft", "2_sft"), ("reward", "3_reward")):
                command = recipe_command(recipe, folder, "--output_dir", str(folder / stage))
                self.python(f"cpu-{stage}", *command, environment=CPU)
        else:
            until = ("--until", "3_reward", "--output_dir", folder, "--plain")
            self.python("cpu", "-m", "pipeline", "run", "recipes/pocket", *until, environment=CPU)
        return folder


def launcher(file: str, processes: int) -> list[object]:
    """Return the words by which python starts a module with a launch file."""
    return ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", processes]


def history(folder: Path, name: str = "loss") -> list[float]:
    """Return what a run logged under a name, step by step."""
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in logged if name in entry]


def furthest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest relative difference of two series; infinite if one is empty or shorter."""
    if not ours or len(ours) != len(theirs):
        return math.inf
    return max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(ours, theirs, strict=True))


def apart(first: Path, second: Path) -> float:
    """Return the largest difference of any weight of two saved models, of their critics as well."""
    paths = [first / "model.safetensors", first / "value_model" / "model.safetensors"]
    files = [path.relative_to(first) for path in paths if path.exists()]
    pairs = [(load_file(first / file), load_file(second / file)) for file in files]
    return max(float((a[name] - b[name]).abs().max()) for a, b in pairs for name in a)


def kill_and_resume(
    bench: Bench, recipe: str, name: str, options: Sequence[object], processes: int = 1
) -> tuple[Path, float, str]:
    """Kill the last process of a training by SIGKILL after its first checkpoint, and run the same command again.

    Returns:
        The folder, the seconds that the launcher lived on, and the log of the second start.
    """
    folder = bench.folder(f"{recipe}-{name}")
    command = [*launcher("accelerate_config.yaml", processes), *bench.options(recipe), *options, "--output_dir", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (bench.output / "logs" / f"{recipe}-{name}-killed.log").open("wb") as log:
        started = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        while not any(folder.glob("checkpoint-*")):
            if started.poll() is not None:
                raise Failed(f"it ended before its first checkpoint; see {log.name}")
            time.sleep(0.01)
        workers = [child for child in psutil.Process(started.pid).children() if "-m" in child.cmdline()]
        workers[-1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        started.wait()
    return folder, time.monotonic() - killed, bench.python(f"{recipe}-{name}", *command)
