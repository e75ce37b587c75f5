"""The part that users read, copy and edit: a short module for each stage, and a folder of YAML files for each scale."""

import gc
import sys

# Imported before torch: it keeps torch's threads from spinning while they wait.
import pipeline  # noqa: F401

# `python -m recipes.NAME` is about to import the module, and with it torch and transformers. They create millions of
# objects, and searching them for garbage takes a sixth of the time until `--help` is printed.
# `pipeline.training.entry.run` enables the collector again.
if sys.argv[:1] == ["-m"]:
    gc.disable()
