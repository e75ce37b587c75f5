"""The library that the recipes use, and the command `fourstage`, which is `python -m pipeline`."""

import os
import sys
from contextlib import suppress
from pathlib import Path

__version__ = "0.1.0"

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    # How often an OpenMP thread polls for work before it sleeps; read when torch is imported, also by child processes.
    # 10,000 is for machines on which others work ("0.20 0.18 0.12 3/83 42": three of 83 tasks run): with libgomp's own
    # number, steps took up to twice as long there. On an idle one, that is 1.1 to 1.4 times as fast in bfloat16.
    load = Path("/proc/loadavg").read_text().split() if os.access("/proc/loadavg", os.R_OK) else []
    os.environ["GOMP_SPINCOUNT"] = "10000" if load and int(load[3].split("/")[0]) > 1 else "300000"

# How many kernels oneDNN and its wrapper in torch cache: one, of up to 1 MB in bfloat16, for each shape of a product.
# Sampling meets new shapes all the time. With the default of 1024, PPO of a 1 M model took 1.4 GB; with 128, 0.9 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")


def search_here_last() -> None:
    """Search the working folder for modules last; functions of the user are still found there.

    `python -m` looks there first. A `pipeline.py` of the user, a folder `recipes/`, or a file named like a library
    (`datasets.py`) would then be imported instead.
    """
    root = str(Path(__file__).parents[1])
    # The working folder may have been deleted.
    with suppress(FileNotFoundError):
        here = os.getcwd()
        others = [place for place in sys.path if place == root or place not in ("", here)]
        # An editable install is not in `sys.path`, and would be found after the working folder.
        sys.path[:] = dict.fromkeys([*others, root, here])


def safe_path() -> dict[str, str]:
    """Return the variable that keeps a new Python from searching the working folder first; {} in a clone."""
    return {} if os.path.exists("pipeline/runner/launcher.py") else {"PYTHONSAFEPATH": "1"}
