"""Python in a process of its own that has imported nothing of ours, as that of somebody who copies it from a page."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", "USE_HUB_KERNELS")
"""Variables that `import pipeline` sets, and that processes inherit from this one."""


def environment() -> dict[str, str]:
    """Return this process's environment as it was before our first import, with the project in the search path."""
    variables = {name: value for name, value in os.environ.items() if name not in OURS}
    return variables | {"PYTHONPATH": str(ROOT)}


def run_python(code: str, folder: Path, *flags: str) -> str:
    """Run Python code in a folder, with flags of Python, and return what it printed. Fail with its traceback."""
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
