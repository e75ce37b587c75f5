"""Data files of tests."""

import csv
import gzip
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_rows(path: str | Path, rows: Iterable[Any]) -> str:
    """Write the rows of a data set, and return the path for `dataset_name`.

    The ending of the path decides on the format: `.csv`, `.parquet`, `.jsonl.gz`, or JSON lines for any other.

    Example:
        args = DataArguments(write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Who?", "chosen": "I.", "rejected": ""}]))
    """
    path, rows = Path(path), list(rows)
    lines = (json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.writelines(lines)
    else:
        path.write_text("".join(lines))
    return str(path)


def link(path: Path, target: Path) -> None:
    """Put a link in place of a file or folder, relative as in a run that was downloaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))
