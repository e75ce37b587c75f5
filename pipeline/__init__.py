"""The library that the recipes use, and the command `fourstage`, which is `python -m pipeline`."""

import os
import sys
from contextlib import suppress
from pathlib import Path

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    # How often an OpenMP thread polls for work before it sleeps; read when torch is imported. By default it polls for
    # milliseconds: on a busy machine, a training step took 21 times as long as on an idle one, and 8 times with this
    # number. On an idle machine it costs 1 to 2%; 1000, or OMP_WAIT_POLICY=PASSIVE, would slow training by up to a
    # sixth, and generation by a quarter to a half.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# How many kernels oneDNN and its wrapper in torch cache: one, of up to 1 MB in bfloat16, for each shape of a product.
# Sampling drops finished rows from its batches, so it meets new shapes all the time: with the default of 1024 kernels,
# PPO with a model of 1 M parameters took 1.4 GB; with 128, 0.9 GB and no more time. Read when the first one runs.
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
