"""The part that users read, copy and edit: a short module for each stage, and a folder of YAML files for each scale."""

import gc
import signal
import sys

# Imported before torch: it keeps torch's threads from spinning while they wait.
import pipeline  # noqa: F401

# `python -m recipes.NAME` is about to import the module, and with it torch and transformers. They create millions of
# objects, and searching them for garbage takes a sixth of the time until `--help` is printed. Ctrl-C ends the process
# without a traceback of what it was importing. `pipeline.training.entry.run` undoes both.
if sys.argv[:1] == ["-m"]:
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
