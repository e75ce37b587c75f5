"""One small data set for all tests of its content."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from recipes.worlds.pocket.build import PocketArguments, build

SIZES = {"size_mb": 0.3, "sft_rows": 1500, "preference_rows": 300, "reasoning_rows": 600}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pocket") / "data"
    build(PocketArguments(str(folder), **SIZES))
    return folder


@pytest.fixture(scope="session")
def rows(data: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """Return a function that reads a split of a config."""
    return lambda config, split: pq.read_table(data / config / f"{split}.parquet").to_pylist()
