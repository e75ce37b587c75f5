"""What an evaluation writes about each example."""

from pipeline.evaluation import intervals
from pipeline.evaluation.results import StageResult


def test_the_content_of_a_row_is_recognised_whatever_the_order_of_its_columns() -> None:
    rows = [
        {"id": 0, "kind": "", "prompt": "1 + 1?", "answer": "2"},
        {"answer": "2", "prompt": "1 + 1?", "kind": "", "id": 0},
        {"id": 0, "kind": "", "prompt": "1 + 2?", "answer": "2"},
    ]
    result = StageResult("2_sft")
    result.record("pass@1", {"value": 0.0, "ci95": (0.0, 0.5), "n": 3, "values": [0, 0, 0]}, rows)
    same, again, other = (example["row"] for example in result.examples)
    assert same == again != other


def test_intervals_of_kinds_are_bootstrapped_with_the_seed_of_the_evaluation() -> None:
    rows = [{"id": number, "kind": "even" if number % 2 == 0 else "odd"} for number in range(40)]
    lengths = [number**2 for number in range(40)]
    result = StageResult("2_sft", seed=5)
    result.record("mean_length", lengths, rows, how=intervals.mean)
    by_kind = result.metrics["mean_length"].by_kind
    assert by_kind["even"] == intervals.mean(lengths[::2], seed=5) != intervals.mean(lengths[::2], seed=0)
    assert by_kind["odd"] == intervals.mean(lengths[1::2], seed=5)
