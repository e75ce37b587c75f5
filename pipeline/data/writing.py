"""Write data sets in the layout of the Hub: README.md, whose header lists the files, and one Parquet file per split."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Json, List, Value, features
from datasets.utils import json as json_of_datasets
from huggingface_hub import DatasetCardData

from pipeline.files import write_folder

Rows: TypeAlias = Iterable[Mapping[str, Any]]
MESSAGES = List({"role": Value("string"), "content": Value("string")})
ANSWERED = ("messages", "chosen", "rejected", "completion")
"""Columns whose messages may call tools."""
CALLING = List(Json())
"""Type of messages with tool calls: a struct would give each call the arguments of all others."""
# The reader of `datasets` turns 0.1234 into 0.12340000000000001, and fails at whole numbers of more than 64 bits.
for _module in (json_of_datasets, features.features):
    _module.ujson_loads = json.loads

_PAIRS = {
    **dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES),
    **dict.fromkeys(("annotator", "first", "kind"), Value("string")),
    **dict.fromkeys(("taste_chosen", "taste_rejected"), Value("float64")),
}
PREFERENCES = Features(_PAIRS).arrow_schema
"""Columns of pairs that annotators, a judge or people have labelled."""
DIALOGUES = Features({**_PAIRS, "chosen": CALLING, "rejected": CALLING, "tools": Value("string")}).arrow_schema
"""Columns of pairs of dialogues with `tools`, which are the JSON of their schemas, as TRL reads it."""


def write_data_set(
    output_dir: str, schemas: Mapping[str, pa.Schema], files: Iterable[tuple[str, str, Rows]], readme: str
) -> None:
    """Write a data set repository from the rows of each configuration and split, either whole or not at all."""
    # pretrain/{train,validation,test}.parquet, sft/…, README.md
    with write_folder(Path(output_dir)) as folder:
        for config, split, rows in files:
            write_rows(folder / config / f"{split}.parquet", schemas[config], rows)
        (folder / "README.md").write_text(readme, encoding="utf-8", newline="\n")


def card(files: Mapping[str, Iterable[str]], text: str, **metadata: Any) -> str:
    """Return the content of README.md: a YAML header with `metadata`, such as `license` and `tags`, and the text.

    `files` has each configuration's splits. Files of `default` are at the top level, others in a folder of that name.
    """
    configs = []
    for config, splits in files.items():
        # default: train.parquet, sft: sft/train.parquet
        folder = "" if config == "default" else f"{config}/"
        data_files = [{"split": split, "path": f"{folder}{split}.parquet"} for split in splits]
        configs.append({"config_name": config, "data_files": data_files})
    return f"---\n{DatasetCardData(configs=configs or None, **metadata)}\n---\n\n{text}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table whose first column is text, and whose others are numbers."""
    alignment = ["---"] + ["---:"] * (len(columns) - 1)
    text = ""
    for cells in (columns, alignment, *rows):
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text


def write_rows(path: Path, schema: pa.Schema, rows: Rows) -> None:
    """Write rows to a Parquet file, with only 2,000 in memory at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = iter(rows)
    # pyarrow converts only texts to JSON, the type of `CALLING`.
    calling = [column.name for column in schema if column.type == pa.list_(pa.json_())]
    texts = pa.list_(pa.string())
    plain = pa.schema([(column.name, texts if column.name in calling else column.type) for column in schema])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, 2_000)):
            converted = []
            for row in group:
                row = dict(row)
                for name in calling:
                    row[name] = [json.dumps(message) for message in row[name]]
                converted.append(row)
            writer.write_table(pa.Table.from_pylist(converted, plain).cast(schema))
