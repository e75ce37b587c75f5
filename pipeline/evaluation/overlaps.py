"""Held-out rows that have a copy among the rows that stages train on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from pipeline.data.overlap import overlap
from pipeline.evaluation.held_out import MAX_TRAINING_ROWS, HeldOut
from pipeline.files import read_json

OVERLAP_WORDS = 13
"""Consecutive words that a held-out row shares with a training row only if it is a copy (as for GPT-3)."""


def find_overlaps(held_out: HeldOut, folder: Path) -> dict[str, dict[str, Any]]:
    """Look for held-out rows among training rows, where both come from one split or the user names the data.

    Args:
        held_out: The rows.
        folder: Where the evaluations of other stages are written, whose findings are used again.

    Returns:
        For each kind of data: the number of `rows`, how many of them are `found`, the number `trained_on` that were
        looked at, the `n` words in a row that must agree, and a `key` that identifies all of these.
    """
    known = [entry for path in sorted(folder.glob("*.json")) for entry in read_json(path).get("overlap", {}).values()]
    overlaps: dict[str, dict[str, Any]] = {}
    for key, part in held_out.suspects.items():
        tests: list[dict[str, Any]] = []
        for row in getattr(held_out, key):
            if key == "text":
                tests.append({"text": row["text"]})
                continue
            # Many rows share their system message, which says nothing about a copy.
            messages = row["messages" if key == "instructions" else "prompt"]
            tests.append({"messages": [message for message in messages if message["role"] != "system"]})
        # The search takes seconds, and its result is the same for every stage of a run. So it is looked up among the
        # findings of other evaluations, under a key of all that it depends on.
        size = len(part.data) if isinstance(part.data, Dataset) else None
        path = Path(str(part.source.dataset_name))
        state = path.stat().st_mtime_ns if path.exists() else None
        content = json.dumps([part.place, part.period, size, state, OVERLAP_WORDS, tests], default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        found = next((entry for entry in known if isinstance(entry, dict) and entry.get("key") == digest), None)
        if found is None:
            rows = (row for _, row in part.sample(MAX_TRAINING_ROWS))
            shared = overlap(rows, tests, OVERLAP_WORDS)
            counts = {"rows": shared.test_rows, "found": len(shared.matches), "trained_on": shared.train_rows}
            found = {**counts, "n": OVERLAP_WORDS, "key": digest}
        overlaps[key] = found
    return overlaps
