"""The part that users read, copy and edit: a short module for each stage, and a folder of YAML files for each scale."""

import gc
import sys

import pipeline  # noqa: F401 - before torch, whose threads it keeps from waiting busily

if sys.argv[:1] == ["-m"]:  # `python -m recipes.NAME` is about to import the module
    # torch and transformers create millions of objects, and searching them for garbage takes a sixth of the time until
    # `--help` is printed. `pipeline.training.entry.run` enables the collector again.
    gc.disable()
