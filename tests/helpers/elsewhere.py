"""Run a module in a directory, in a fork of a warm process: `python -m tests.helpers.elsewhere DIRECTORY MODULE ...`.

The libraries are imported once, before the fork.
"""

import os
import runpy
import sys

from pipeline.runner import launcher

if __name__ == "__main__":
    _, directory, module, *arguments = sys.argv
    os.chdir(directory)
    if module == launcher.__name__:
        sys.exit(launcher.main(arguments, forked=True))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
