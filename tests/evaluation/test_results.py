"""What an evaluation writes about each example."""

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
