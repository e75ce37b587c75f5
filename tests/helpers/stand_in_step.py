"""A stand-in for a training step in the tests of the runner, which does at once what its YAML file says.

`python -m tests.helpers.stand_in_step --config FILE [--output_dir DIR] …` appends a line to `ran.txt` in its output.
`fails: N` makes it exit with code N the first time; `waits: true` makes it wait for a signal, save for half a second,
or for `saves` seconds, and end;
`vanishes: true` makes it delete its output folder and end with code 0. `prints: N` makes it print N lines, and
`reports: N` makes it report N units of progress, one every tenth of a second.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import yaml

from pipeline.progress import report_progress


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    args, overrides = parser.parse_known_args()
    settings = yaml.safe_load(args.config.read_text())
    settings |= {flag.removeprefix("--"): value for flag, value in zip(overrides[::2], overrides[1::2], strict=True)}
    directory = Path(settings["output_dir"])
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "ran.txt").open("a") as file:
        file.write(" ".join(f"{key}={value}" for key, value in sorted(settings.items())) + "\n")
    for number in range(settings.get("prints", 0)):
        print(f"line {number}", flush=True)
    for number in range(settings.get("reports", -1) + 1):
        report_progress(done=number, total=settings["reports"], loss=0.5)
        time.sleep(0.1)
    if settings.get("fails") and not (directory / "recovered").exists():
        (directory / "recovered").touch()
        print("the step's own message", file=sys.stderr)
        return int(settings["fails"])
    if settings.get("waits"):
        wait_for_signal(directory, settings.get("saves", 0.5))
    if settings.get("vanishes"):
        shutil.rmtree(directory)
    return 0


def wait_for_signal(directory: Path, seconds: float) -> None:
    """Wait, unless a checkpoint exists already; after a signal, save one in that many seconds."""
    checkpoint = directory / "checkpoint"

    def save(number: int, _: FrameType | None) -> None:
        time.sleep(seconds)
        checkpoint.write_text(str(number))
        sys.exit(128 + number)

    if checkpoint.exists():
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, save)
    (directory / "pid").write_text(str(os.getpid()))
    time.sleep(60)


if __name__ == "__main__":
    sys.exit(main())
