"""The library that the recipes use, and the command `fourstage`, which is `python -m pipeline`."""

import os
import sys
from contextlib import suppress
from pathlib import Path

__version__ = "0.1.0"

ROOT = str(Path(__file__).parents[1])
"""The folder that contains this package."""

if "OMP_WAIT_POLICY" not in os.environ:
    # How often an OpenMP thread polls before it sleeps; read when torch is imported. With the default, training
    # steps took 21 times as long on a busy machine as on an idle one; with this number 8 times, and 1 to 2% more on an
    # idle one. 1000 (or OMP_WAIT_POLICY=PASSIVE) would slow training by up to a sixth, generation by a quarter or more.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# How many kernels oneDNN and its wrapper in torch cache, of up to 1 MB for each shape of a product. Sampling drops rows
# that end, and so meets new shapes all the time: PPO with 1M parameters took 1.4 GB with the default, 1024; now 0.9 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
# From 5.25 on, transformers would look for kernels on the Hub for every model that is loaded, and run them. If it was
# imported first, a model may have them already, whose `train()` would raise an error once they are switched off.
if "transformers" not in sys.modules:
    os.environ.setdefault("USE_HUB_KERNELS", "NO")


def leave_out_working_directory() -> None:
    """Take the working directory out of the search path for modules, in which `python -m` puts it first.

    A `pipeline.py` of the user, a folder `recipes/`, or a file named like a library (`datasets.py`) would be imported
    instead. In a downloaded folder, so would a file named like a module that libraries try to import, such as
    `numexpr`. `pipeline.config.named_code` finds the functions that the user names there.
    """
    # The working directory may have been deleted.
    with suppress(FileNotFoundError):
        working_directory = os.getcwd()
        libraries = [folder for folder in sys.path if folder == ROOT or folder not in ("", working_directory)]
        # An editable install is not in `sys.path`.
        sys.path[:] = dict.fromkeys([*libraries, ROOT])


def safe_path() -> dict[str, str]:
    """Return the variable that keeps a new Python from searching the working directory, {} where that is the project.

    There, it may be the only way to find this package.
    """
    if os.path.realpath(os.curdir) == os.path.realpath(ROOT):
        return {}
    return {"PYTHONSAFEPATH": "1"}
