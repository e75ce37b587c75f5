"""Generates the pocket data set.

python -m pipeline.pocket --config recipes/pocket/0_data.yaml
"""

import logging

from pipeline.arguments import parse
from pipeline.errors import exit_on_user_error
from pipeline.pocket.build import PocketArguments, build

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_user_error():
        build(*parse(PocketArguments))
