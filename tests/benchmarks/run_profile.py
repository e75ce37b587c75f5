"""
# Where the seconds of a run go

```bash
python -m tests.benchmarks.run_profile --run runs/pocket
```

Reads a finished run. For each step, prints the seconds that `run.json` counts and, of a step that trains, what the log
of its trainer attributes: updates with the checkpoints between them, held-out evaluations, and the rest, which is
starting, loading and saving the model. Of a step that was resumed, the log has the last part alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = ("seconds", "updates", "evaluation", "rest", "ms/update", "tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/pocket"), help="folder with run.json")
    run = parser.parse_args().run
    steps = json.loads((run / "run.json").read_text(encoding="utf-8"))["steps"]
    rows = {name: profile(entry["seconds"], run / name / "trainer_state.json") for name, entry in steps.items()}
    sums = {column: sum(row.get(column, 0.0) for row in rows.values()) for column in COLUMNS[:4]}
    width = max(map(len, rows))
    print(f"{'':{width}}" + "".join(f"{column:>12}" for column in COLUMNS) + f"{'share':>8}")
    for name, row in {**rows, "sum": sums}.items():
        cells = "".join(f"{f'{row[column]:,.1f}' if column in row else '':>12}" for column in COLUMNS)
        print(f"{name:{width}}{cells}{row['seconds'] / sums['seconds']:8.1%}")


def profile(seconds: float, state: Path) -> dict[str, float]:
    """Return the columns of a step.

    Args:
        seconds: What it took as a whole.
        state: State of its trainer; it need not exist.
    """
    row = {"seconds": seconds}
    if not state.is_file():
        return row | {"rest": seconds}
    content: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    history = content["log_history"]
    evaluation = sum(entry.get("eval_runtime", 0.0) for entry in history)
    training = history[-1]["train_runtime"] - evaluation
    row |= {"updates": training, "evaluation": evaluation, "rest": seconds - training - evaluation}
    row["ms/update"] = 1000 * training / content["global_step"]
    if tokens := content.get("num_input_tokens_seen"):
        row["tokens/s"] = tokens / training
    return row


if __name__ == "__main__":
    main()
