"""Answers of the stage that others are compared with: saved with its evaluation, and used by those of the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from pipeline.evaluation.held_out import Example

FILES = ("*config.json", "*token*.json", "tokenizer.model", "vocab.*", "merges.txt", "*.jinja", "*.safetensors")
"""Files of a model that its answers depend on; records of its training lie beside them."""


def fingerprint(model: Path, rows: Sequence[Example], **settings: object) -> str:
    """Return a hash of all that the answers of the model in `model` to `rows` depend on on one machine.

    It is empty for an adapter, whose base model may change elsewhere.
    """
    if (model / "adapter_config.json").exists():
        return ""
    software = [torch.__version__, transformers.__version__, torch.get_num_threads()]
    digest = hashlib.sha256(json.dumps([software, settings, rows], sort_keys=True, default=str).encode())
    for path in sorted({path for pattern in FILES for path in model.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def saved_answers(run: Path, stage: str, wanted: str) -> dict[str, list[str]] | None:
    """Return what RUN/STAGE answered when it was evaluated, by metric; None unless its fingerprint is `wanted`."""
    path = run / "evaluations" / f"{stage}.json"
    try:
        if not wanted or json.loads(path.read_text(encoding="utf-8"))["opponent"] != wanted:
            return None
        lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").split("\n")
        examples = [json.loads(line) for line in lines if line]
        return {
            name: [str(example["opponent"]) for example in examples if example["metric"] == name]
            for name in ("win_rate", "win_rate_greedy")
        }
    except (OSError, ValueError, LookupError, TypeError):  # missing, damaged, or of an earlier release
        return None
