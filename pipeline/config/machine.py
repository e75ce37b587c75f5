"""Hardware, package versions and commit, for `run.json` and model cards, read without importing torch."""

import contextlib
import os
import platform
import re
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

TRAINING = ("torch", "transformers", "trl")
"""The packages that decide what a step computes."""


def describe_machine() -> dict[str, Any]:
    """Return what a step's entry in `run.json` says about the machine.

    Returns:
        `hardware` is a mapping with the system, the GPUs if there are any, the processor and the memory. `versions` are
        those of the packages. `commit` is the commit of this checkout, with "-dirty" if files differ from it, or None
        outside of a checkout.
    """
    facts: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}"}
    # The driver lists the GPUs, each with a line "Model: NVIDIA H100". Importing torch would take seconds.
    texts = [file.read_text("utf-8") for file in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    gpus = Counter(re.findall(r"^Model:\s*(.*\S)", "\n".join(texts), re.MULTILINE))
    if gpus:
        facts["gpu"] = ", ".join(f"{count} x {name}" for name, count in sorted(gpus.items()))
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["processor"] = _processor()
    facts["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)

    versions = {"python": platform.python_version()}
    versions |= package_versions("fourstage", *TRAINING, "accelerate", "datasets", "tokenizers", "peft")
    # If the package is installed inside another project's checkout, the commit would be that project's.
    is_tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if is_tracked else None
    return {"hardware": facts, "versions": versions, "commit": commit}


def package_versions(*names: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _processor() -> str:
    """Return the name of the processor, such as "AMD EPYC 7B13"; outside of Linux, what Python reports."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        match = re.search(r"^model name\s*: *(.*)", file.read_text("utf-8"), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor()


def _git(*arguments: str) -> str | None:
    """Return the output of git in this file's folder, or None if it fails."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None
