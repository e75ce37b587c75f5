"""
# Kills: no run is lost, and every run ends with the weights, logs and metrics of an undisturbed one

```bash
python -m tests.benchmarks.kills --recipe sft --kills 50
python -m tests.benchmarks.kills --recipe ppo --kills 10 --damage 10
```

Trains a miniature of a recipe once undisturbed, in a process as a user starts it. Then it trains the miniature again,
as often as the kills require: it kills it by SIGKILL at random moments, restarts it by the same command until it
finishes, and compares bit for bit: the weights, of the last checkpoint as well, what was logged at each step, each
evaluation, the best checkpoint, the counts in the state, and which files there are. Evaluations decide which model is
kept. Some kills hit what follows the last checkpoint: its evaluation, the loading of the best model, and the writing of
the final one. `--damage N` also damages the newest checkpoint after N of the kills: a file is truncated or deleted, or
one bit is flipped.

The killed processes are forks of this one, which has already imported the libraries, so that a kill costs two seconds
instead of ten. The exit code is 1 if a run was lost or ended differently.
"""

import argparse
import importlib
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPES = ("pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo")
LIBRARIES = (
    "trl.trainer.sft_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.grpo_trainer",
    "pipeline.training.inputs",
)
TRAINS = b"\nbatch "
"""What is logged right before the first step."""

RESUMES = b"\nresuming "
"""What a resumed process logs before it trains or, if only the end was missing, evaluates."""

STATE = (
    "best_metric", "best_global_step", "best_model_checkpoint", "global_step", "max_steps", "epoch", "total_flos",
    "num_input_tokens_seen",
)  # fmt: skip
"""What is compared of the final state of a training, in addition to its log."""

TIMES = re.compile(r"time$|seconds$|per_second$|mfu$|memory$")
"""Names of logged values that differ from one run to the next."""

BEFORE_TRAINING = 0.2
"""Share of the kills that happen before the first step of a process."""

AT_THE_END = 0.3
"""Share of the other kills that happen after the last checkpoint was written, half of them in its evaluation."""

PART = 0.4
"""Longest life of a process, as a share of an undisturbed training, so that a run takes several kills."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damage", type=int, default=0, help="number of kills after which to damage a checkpoint")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps per run")
    parser.add_argument("--seed", type=int, default=0, help="random seed of moments and damage")
    args = parser.parse_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        return Trial(args, Path(folder)).run()


class Trial:
    """One undisturbed run, and as many others as the kills take.

    Args:
        args: The command line's.
        folder: An empty folder that everything is written to.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.random = random.Random(args.seed)
        self.kills = self.damages = 0
        self.skipped = 0
        self.resumed: list[str] = []
        self.startup = self.training = 0.0
        # Seconds of the last evaluation, and from the last checkpoint to the end of the process.
        self.evaluation = self.ending = 0.0
        # Number of kills between the last checkpoint and the record of its evaluation, and after that.
        self.in_evaluation = self.afterwards = 0

    def run(self) -> int:
        """Run everything, and return the exit code: 0 if every run ended like the undisturbed one."""
        self._undisturbed()
        for name in LIBRARIES:
            importlib.import_module(name)
        wrong = runs = 0
        while self.kills < self.args.kills:
            runs += 1
            before = self.kills
            problem = self._disturbed(self.folder / f"run-{runs}")
            wrong += problem is not None
            resumed = f"resumed after steps {', '.join(self.resumed)}" if self.resumed else "never resumed"
            outcome = problem or "the same weights, logs and best checkpoint"
            print(f"run {runs}: {self.kills - before} kills, {resumed}, {outcome}", flush=True)
        print(
            f"{self.args.recipe}: {runs} runs, {self.kills} kills, {self.damages} damaged checkpoints "
            f"({self.skipped} skipped), {self.in_evaluation} kills in the last evaluation, {self.afterwards} after it, "
            f"{wrong} wrong"
        )
        return int(wrong > 0)

    def _undisturbed(self) -> None:
        output, log = self.folder / "whole", self.folder / "whole.log"
        started = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen([sys.executable, *self._command(output)], stdout=file, stderr=subprocess.STDOUT)
            self._wait_until(lambda: process.poll() is not None or TRAINS in log.read_bytes())
            begun = time.monotonic()
            self._wait_until(lambda: process.poll() is not None or self._last(output).exists())
            trained = time.monotonic()
            process.wait()
        self.startup, self.training = 2.0, time.monotonic() - begun
        self.ending = time.monotonic() - trained
        if process.returncode != 0:
            raise SystemExit(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
        state = _state(output)
        self.evaluation = [entry["eval_runtime"] for entry in state["log_history"] if "eval_runtime" in entry][-1]
        print(
            f"undisturbed: {begun - started:.1f} s to the first step, {self.training:.1f} s of training, the last "
            f"{self.ending:.1f} s after the last checkpoint; the best is that of step {state['best_global_step']}"
        )

    def _disturbed(self, output: Path) -> str | None:
        """Train with kills, and return what is wrong with the run, or None."""
        log = output.with_suffix(".log")
        self.resumed = []
        while True:
            pid = self._fork(output, log)
            if self.random.random() < BEFORE_TRAINING:
                self._sleep(self.random.uniform(0, self.startup), pid)
            elif self.random.random() < AT_THE_END:
                self._wait_for_end_of_training(pid, output, log)
                self._sleep(self.random.uniform(0, self.random.choice([self.evaluation, self.ending])), pid)
            else:
                self._wait_until(lambda: _ended(pid) or TRAINS in log.read_bytes())  # noqa: B023
                self._sleep(self.random.uniform(0, PART * self.training), pid)
            if self.kills < self.args.kills and not _ended(pid):
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            text = log.read_text(errors="replace")
            self.skipped += text.count("is skipped because it is damaged")
            self.resumed += re.findall(r"^resuming +from .*-(\d+)$", text, re.MULTILINE)
            if code == -signal.SIGKILL:
                self.kills += 1
                self._count_place(output)
                if self.damages < self.args.damage:
                    self._damage(output)
                continue
            if code != 0:
                return f"exit code {code}:\n{log.read_text()[-3000:]}"
            return self._difference(output)

    def _difference(self, output: Path) -> str | None:
        """Return how a finished run differs from the undisturbed one, or None."""
        whole = self.folder / "whole"
        problems = []
        if not _same(_weights(whole), _weights(output)):
            problems.append("OTHER WEIGHTS")
        if not _same(_weights(self._last(whole)), _weights(self._last(output))):
            problems.append("OTHER WEIGHTS of the last checkpoint")
        if _files(whole) != _files(output):
            problems.append(f"OTHER FILES ({', '.join(sorted(_files(whole) ^ _files(output)))})")
        if "\n- Time: " not in (output / "README.md").read_text():
            problems.append("NO TIME in the card")
        expected, state = _state(whole), _state(output)
        problems += [f"OTHER {name}" for name in STATE if expected[name] != state[name]]
        for entry, other in zip_longest(_timeless(expected["log_history"]), _timeless(state["log_history"])):
            if entry != other:
                entry, other = entry or {}, other or {}
                names = [name for name in {**entry, **other} if entry.get(name) != other.get(name)]
                step = (entry or other)["step"]
                problems.append(f"OTHER LOG from step {step} on ({', '.join(names[:5])})")
                break
        return ", ".join(problems) or None

    def _last(self, output: Path) -> Path:
        """Return the folder of the last checkpoint."""
        return output / f"checkpoint-{self.args.steps}"

    def _wait_for_end_of_training(self, pid: int, output: Path, log: Path) -> None:
        """Wait for the last checkpoint or, if an earlier process has written it, until this one resumes from it."""
        if self._last(output).exists():
            self._wait_until(lambda: _ended(pid) or RESUMES in log.read_bytes())
        else:
            self._wait_until(lambda: _ended(pid) or self._last(output).exists())

    def _count_place(self, output: Path) -> None:
        """Count a kill that happened after the last checkpoint was written."""
        manifest = self._last(output) / "manifest.json"
        if not manifest.exists():
            return
        # The state with the evaluation is the second one.
        if len(json.loads(manifest.read_text())["states"]) > 1:
            self.afterwards += 1
        else:
            self.in_evaluation += 1

    def _fork(self, output: Path, log: Path) -> int:
        """Start the recipe in a fork, and return its process id."""
        log.unlink(missing_ok=True)
        log.touch()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            _, module, *sys.argv[1:] = self._command(output)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - it is logged; a fork must not continue as its parent
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            time.sleep(0.005)

    def _sleep(self, seconds: float, pid: int) -> None:
        end = time.monotonic() + seconds
        self._wait_until(lambda: time.monotonic() > end or _ended(pid))

    def _damage(self, output: Path) -> None:
        """Damage the newest checkpoint, if one exists."""
        from pipeline.training.checkpoint_folders import checkpoints

        found = checkpoints(output)
        if not found:
            return
        path = self.random.choice(sorted(path for path in found[-1].rglob("*") if path.is_file()))
        size = path.stat().st_size
        how = self.random.choice(["cut", "delete", "flip"])
        if how == "delete" or size == 0:
            path.unlink()
        elif how == "cut":
            os.truncate(path, self.random.randrange(size))
        else:
            content = bytearray(path.read_bytes())
            content[self.random.randrange(size)] ^= 1 << self.random.randrange(8)
            path.write_bytes(content)
        self.damages += 1
        print(f"  {how} {path.relative_to(output)}", flush=True)

    def _command(self, output: Path) -> list[str]:
        """Return `-m recipes.NAME` with its options, and make its small inputs if they do not exist."""
        recipe, steps = self.args.recipe, ["--max_steps", str(self.args.steps)]
        if recipe not in ("ppo", "grpo"):
            from tests.helpers.small_model import recipe_command

            # The highest loss counts as the best, so that another model than the last one is kept.
            best = ["--eval_steps", "2", "--load_best_model_at_end", "true", "--greater_is_better", "true"]
            return recipe_command(recipe, self.folder / "inputs", *steps, *best, "--output_dir", str(output))
        return [*self._rollout_command(), *steps, "--output_dir", str(output)]

    def _rollout_command(self) -> list[str]:
        """Return the command of PPO or GRPO, whose rollouts serve several steps, so that kills interrupt one."""
        from tests.helpers.sampling_recipes import write_config

        inputs = self.folder / "inputs"
        if not inputs.exists():
            # The scores of PPO's evaluations depend on the rollouts so far; the best checkpoint is one of the middle.
            specific = {"steps_per_generation": 6, "metric_for_best_model": "reward"}
            if self.args.recipe == "ppo":
                specific = {"reward_normalization": "running", "metric_for_best_model": "objective/scores"}
            evaluates = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
            saves = {"save_steps": 2, "save_total_limit": 2, "disable_tqdm": True}
            write_config(self.args.recipe, inputs, **saves, **evaluates, **specific)
        return ["-m", f"recipes.{self.args.recipe}", "--config", str(inputs / f"{self.args.recipe}.yaml")]


def _ended(pid: int) -> bool:
    """Return whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _weights(output: Path) -> dict[str, bytes]:
    """Read every file of the final weights, without the checkpoints."""
    found = {str(path.relative_to(output)): path for path in output.rglob("*.safetensors")}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("checkpoint-")}


def _files(output: Path) -> set[str]:
    """Return the names of all files, with those of the checkpoints."""
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


def _state(output: Path) -> dict[str, Any]:
    """Return the final state of a training, with the best checkpoint's name instead of its path."""
    state = json.loads((output / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"] or "").name
    return state


def _timeless(history: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log without seconds; of the summary, which is about the last process, only its step."""
    for entry in history:
        if "train_runtime" in entry and "loss" not in entry:
            yield {"step": entry["step"], "summary": True}
        else:
            yield {name: value for name, value in entry.items() if not TIMES.search(name)}


def _same(first: dict[str, bytes], second: dict[str, bytes]) -> bool:
    return bool(first) and first == second


if __name__ == "__main__":
    sys.exit(main())
