"""Held-out rows that have a copy among the rows that stages train on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset

from pipeline.data.overlap import overlap
from pipeline.evaluation.held_out import MAX_TRAINING_ROWS, HeldOut
from pipeline.files import read_json

OVERLAP_WORDS = 13
"""Consecutive words that a held-out row shares with a training row only if it is a copy (as for GPT-3)."""


MAX_SHARED = 3
"""Held-out rows that may share the same words with training rows: what more of them share is part of a template."""


def find_overlaps(held_out: HeldOut, folder: Path) -> dict[str, dict[str, Any]]:
    """Look for held-out rows among the training rows of all stages.

    Args:
        held_out: The rows, and where copies of them might be.
        folder: Where the evaluations of other stages are written, whose findings are used again.

    Returns:
        For each kind of data: the number of `rows`, how many of them are `found`, the number `trained_on` that were
        looked at, the `n` words in a row that must agree, how many are found `in` which training rows (those of which
        none is found are omitted), and a `key` that identifies all of these.
    """
    tests: dict[str, list[dict[str, Any]]] = {}
    for key in sorted({key for _, keys in held_out.suspects.values() for key in keys}):
        if key == "text":
            tests[key] = [{"text": row["text"]} for row in held_out.text]
            continue
        # Many rows share their system message, which says nothing about a copy.
        column = "messages" if key == "instructions" else "prompt"
        tests[key] = [
            {"messages": [message for message in row[column] if message["role"] != "system"]}
            for row in getattr(held_out, key)
        ]
    # The search takes seconds, and its result is the same for every stage of a run. So it is looked up among the
    # findings of other evaluations, under a key of all that it depends on.
    places = []
    for part, keys in held_out.suspects.values():
        path = Path(str(part.source.dataset_name))
        size = len(part.data) if isinstance(part.data, Dataset) else None
        places.append([part.place, part.period, size, path.stat().st_mtime_ns if path.exists() else None, keys])
    content = json.dumps([places, OVERLAP_WORDS, tests], default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    for path in sorted(folder.glob("*.json")):
        known = read_json(path).get("overlap")
        # A damaged file may hold anything.
        entries = known if isinstance(known, dict) else {}
        if entries and all(isinstance(entry, dict) and entry.get("key") == digest for entry in entries.values()):
            return dict(entries)

    found: dict[str, set[int]] = {key: set() for key in tests}
    counts: dict[str, dict[str, Any]] = {
        key: {"rows": len(rows), "trained_on": 0, "n": OVERLAP_WORDS, "in": {}} for key, rows in tests.items()
    }
    for name, (part, keys) in held_out.suspects.items():
        looked_for = [(key, number) for key in keys for number in range(len(tests[key]))]
        rows = (row for _, row in part.sample(MAX_TRAINING_ROWS))
        shared = overlap(rows, (tests[key][number] for key, number in looked_for), OVERLAP_WORDS)
        times = Counter(match.shared for match in shared.matches)
        copies = [looked_for[match.test_row] for match in shared.matches if times[match.shared] <= MAX_SHARED]
        for key in keys:
            counts[key]["trained_on"] += shared.train_rows
            if numbers := {number for of, number in copies if of == key}:
                found[key] |= numbers
                counts[key]["in"][name] = len(numbers)
    return {key: {**entry, "found": len(found[key]), "key": digest} for key, entry in counts.items()}
