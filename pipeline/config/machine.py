"""Hardware, package versions and commit, for `run.json` and model cards; without torch, which takes seconds."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("fourstage", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "peft")


def describe_machine() -> dict[str, Any]:
    """Return what a step's entry in `run.json` says about the machine: `hardware`, `versions` and `commit`."""
    return {"hardware": hardware(), "versions": versions(), "commit": commit()}


def hardware() -> dict[str, Any]:
    """Return system, GPUs if any, cores that this process may use, processor, and memory in GiB where known."""
    facts: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}"}
    # The driver names the GPUs, such as "2 x NVIDIA H100"; importing torch would take seconds.
    names: Counter[str] = Counter()
    for file in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        lines = file.read_text(encoding="utf-8").splitlines()
        names.update(line.partition(":")[2].strip() for line in lines if line.startswith("Model:"))
    if names:
        facts["gpu"] = ", ".join(f"{count} x {name}" for name, count in sorted(names.items()))
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    facts["processor"] = next(models, platform.processor())
    facts["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    return facts


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine what a run computes, if installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if files differ from it; None outside of a checkout."""
    # If the package is installed inside another project's checkout, the commit would be that project's.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    """Return the output of git in this file's folder, or None if it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
