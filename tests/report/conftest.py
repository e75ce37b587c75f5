"""Runs that every test of the report may read, and must not write to."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tests.helpers.fake_run import UNTIL_SFT, write_run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all six stages."""
    return write_run(tmp_path_factory.mktemp("runs") / "pocket")


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every text attacks the page."""
    return write_run(tmp_path_factory.mktemp("runs") / "hostile", seed=3, hostile=True)


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stages 0 to 2."""
    return write_run(tmp_path_factory.mktemp("runs") / "short", seed=4, stages=UNTIL_SFT)
