"""
# Two versions of pocket in turns of a second, so that both meet the same machine

    python -m tests.benchmarks.turns --record ../record --contender ../contender --runs ../runs --seeds 0 1 2

`--record` and `--contender` are clones. For each seed both run the recipe at the same time, to `RUNS/record/seed0`,
`RUNS/contender/seed0` and so on, but one of them is always stopped (SIGSTOP):

    record     ###   ###   ###   ###   ###
    contender     ###   ###   ###   ###   ######     it goes on alone after the other has ended

On a virtual machine, speed may change by a third within minutes. Runs that follow each other meet different minutes;
these meet the same ones. The seconds that each step had for itself are in each run's `turns.json`, where
`tests.benchmarks.contest` finds them: those in `metrics.json` and in logs include the other version's turns. A step
counts from the end of the one before it, to a turn's length, and steps that run.json does not name any more are part of
the next one.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import psutil

TURN = 1.0
"""Seconds of a turn: several updates of training."""
NAME = "turns.json"


class Side:
    """A version's run, which stands still outside its turns.

    Args:
        clone: The version's working tree.
        run: Folder of the run.
        command: What to start there.
        log: Receives what the run prints.
    """

    def __init__(self, clone: Path, run: Path, command: list[str], log: IO[Any]) -> None:
        self.run, self.seconds, self._steps = run, 0.0, dict[str, float]()
        # In a session of its own, every process of the run can be found, also those of other process groups.
        self._process = subprocess.Popen(command, cwd=clone, stdout=log, stderr=log, start_new_session=True)
        self._signal(signal.SIGSTOP)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def take_turn(self) -> None:
        """Let the run go on for a turn, and count the seconds towards the step that is running."""
        began = time.monotonic()
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(TURN)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGSTOP)
        self.seconds += time.monotonic() - began
        for name in self._finished():
            self._steps.setdefault(name, self.seconds - sum(self._steps.values()))

    def finish(self) -> None:
        """Write the seconds of each step.

        Raises:
            SystemExit: If the run failed.
        """
        if self._process.returncode:
            raise SystemExit(f"{self.run} failed with exit code {self._process.returncode}; see {self.run}.log")
        (self.run / NAME).write_text(json.dumps(self._steps, indent=1) + "\n", encoding="utf-8")

    def stop(self) -> None:
        """End every process of the run."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _finished(self) -> list[str]:
        try:
            steps = json.loads((self.run / "run.json").read_text(encoding="utf-8")).get("steps", {})
        except FileNotFoundError:
            return []
        return [name for name, step in steps.items() if step.get("finished_at")]

    def _signal(self, number: signal.Signals) -> None:
        reached = set[int]()
        # Once more for processes that one of them started before the signal came.
        while more := self._pids() - reached:
            for pid in more:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            reached |= more

    def _pids(self) -> set[int]:
        found = set()
        for pid in psutil.pids():
            # Gone since, or a stranger's, which not every system lets one ask about.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(pid) == self._process.pid:
                    found.add(pid)
        return found


def seconds(run: Path) -> float:
    """Return the seconds that a run had for itself."""
    return float(sum(json.loads((run / NAME).read_text(encoding="utf-8")).values()))


def take_turns(sides: list[Side]) -> None:
    """Run both to their ends, and print the seconds of each."""
    try:
        while not all(side.ended for side in sides):
            for side in sides:
                if not side.ended:
                    side.take_turn()
        for side in sides:
            side.finish()
    finally:
        for side in sides:
            side.stop()
    print(", ".join(f"{side.run}: {side.seconds:.1f} s" for side in sides), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="clone of the record")
    parser.add_argument("--contender", type=Path, required=True, help="clone of the contender")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs of both")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="default: 0 to 9")
    parser.add_argument("--recipe", default="recipes/pocket", help="default: recipes/pocket")
    args, more = parser.parse_known_args()
    for seed in args.seeds:
        runs = [(args.runs / name / f"seed{seed}").absolute() for name in ("record", "contender")]
        if all((run / NAME).exists() for run in runs):
            continue
        if begun := [str(run) for run in runs if run.exists()]:
            raise SystemExit(f"{', '.join(begun)} was interrupted: delete the runs of this seed on both sides")
        sides = []
        for clone, run in zip((args.record, args.contender), runs, strict=True):
            run.parent.mkdir(parents=True, exist_ok=True)
            options = ["--seed", str(seed), "--output_dir", str(run), *more]
            with Path(f"{run}.log").open("w") as log:
                sides.append(Side(clone, run, [sys.executable, "-m", "pipeline", "run", args.recipe, *options], log))
        # Who begins changes with each seed.
        take_turns(sides if seed % 2 == 0 else sides[::-1])


if __name__ == "__main__":
    main()
