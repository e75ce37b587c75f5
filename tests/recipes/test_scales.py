"""The recipes for GPUs: their smoke runs, on a Hub with data sets of the same ids, configurations and columns."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pipeline.__main__ import main
from tests.helpers.hub_server import Hub
from tests.helpers.small_model import ROOT, TEXT, conversation
from tests.hub.conftest import use

WEB = [
    {
        "text": TEXT * 8,
        "id": f"<urn:uuid:{i}>",
        "dump": "CC-MAIN-2024-10",
        "url": f"https://example.org/{i}",
        "file_path": "s3://commoncrawl/warc.gz",
        "language": "en",
        "language_score": 0.97,
        "token_count": 230,
        "score": 2.8,
        "int_score": 3,
    }
    for i in range(300)
]
CHATS = [conversation(f"What is {i} + 1?", f"It is {i + 1}.") for i in range(120)]
# Rows with an empty answer or with a special token in their text are left out.
CHATS[3][1]["content"], CHATS[5][0]["content"] = "", "What does <|user|> mean?"
REFUSED = [conversation(f"What is {i} + 1?", "I do not know.") for i in range(120)]
PAIRS = [
    {
        "prompt": chosen[0]["content"],
        "prompt_id": str(i),
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.0,
        "score_rejected": 6.5,
    }
    for i, (chosen, rejected) in enumerate(zip(CHATS, REFUSED, strict=True))
]
MIXTURE = [
    {
        # The prompt is only the last message before the answers.
        "prompt": chosen[0]["content"],
        "chosen": [*conversation("Hello.", "Yes?"), *chosen] if i % 10 == 0 else chosen,
        "rejected": [*conversation("Hello.", "Yes?"), *rejected] if i % 10 == 0 else rejected,
        "chosen_rating": None,
        "rejected_rating": 2.0,
        "chosen_model": "a",
        "rejected_model": "b",
        "source": "mix",
        "id": str(i),
    }
    for i, (chosen, rejected) in enumerate(zip(CHATS, REFUSED, strict=True))
]
PROBLEMS = [
    {
        "messages": chat[:1],
        "ground_truth": str(i + 1),
        "dataset": ("gsm8k", "MATH", "ifeval")[i % 3],
        "constraint_type": None if i % 3 < 2 else "words",
        "constraint": None if i % 3 < 2 else "Use three words.",
    }
    for i, chat in enumerate(CHATS)
]
DATA_SETS: Mapping[str, tuple[Mapping[str, str], list[dict[str, Any]]]] = {
    "HuggingFaceFW/fineweb-edu": (
        {
            "default:train": "data/CC-MAIN-2013-20/train-00000-of-00014.parquet",
            "sample-10BT:train": "sample/10BT/000_00000.parquet",
            "sample-100BT:train": "sample/100BT/000_00000.parquet",
        },
        WEB,
    ),
    "HuggingFaceTB/smol-smoltalk": (
        {"default:train": "data/train-00000-of-00001.parquet", "default:test": "data/test-00000-of-00001.parquet"},
        [{"messages": chat, "source": "smol-magpie-ultra-short"} for chat in CHATS],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {f"default:{split}": f"data/{split}-00000-of-00001.parquet" for split in ("train_prefs", "test_prefs")},
        PAIRS,
    ),
    "allenai/tulu-3-sft-olmo-2-mixture-0225": (
        {"default:train": "data/train-00000-of-00001.parquet"},
        [{"id": str(i), "messages": chat, "source": "personahub"} for i, chat in enumerate(CHATS)],
    ),
    "allenai/olmo-2-0425-1b-preference-mix": ({"default:train": "data/train-00000-of-00001.parquet"}, MIXTURE),
    "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints": ({"default:train": "data/train-00000-of-00001.parquet"}, PROBLEMS),
}
"""Id -> file of each `configuration:split`, and the rows of all of them, with the columns that they have on the Hub."""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    for name, (files, rows) in DATA_SETS.items():
        buffer = io.BytesIO()
        Dataset.from_list(rows).to_parquet(buffer)
        card = "---\nconfigs:\n"
        for config in dict.fromkeys(key.partition(":")[0] for key in files):
            card += f"- config_name: {config}\n  data_files:\n"
            own = {key.partition(":")[2]: path for key, path in files.items() if key.startswith(f"{config}:")}
            card += "".join(f"  - split: {split}\n    path: {path}\n" for split, path in own.items())
        server.add(name, dict.fromkeys(files.values(), buffer.getvalue()), type="dataset")
        server.add(name, {"README.md": (card + "---\n").encode()}, type="dataset")
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["small", "base"])
def test_a_smoke_run_takes_every_stage(
    scale: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if scale == "small":
        pytest.importorskip("reasoning_gym")
    use(hub, monkeypatch, tmp_path / "cache/hub", token=None)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    try:
        assert main(["run", f"recipes/{scale}", "--smoke", "--output_dir", str(tmp_path / "run")]) == 0
    except SystemExit:
        pytest.fail("\n".join(text[-3000:] for text in capfd.readouterr()))
    metrics = json.loads((tmp_path / "run/report/metrics.json").read_text())
    assert {"0_random", "1_pretrain", "2_sft", "3_reward", "3_ppo", "4_grpo"} <= set(metrics["stages"])
    assert "reward_accuracy" in metrics["stages"]["3_reward"]
    assert {"bits_per_byte", "pass@1"} <= set(metrics["stages"]["4_grpo"])
    if scale == "small":
        tasks = set(metrics["stages"]["4_grpo"]["pass@1"]["by_kind"])
        assert len(tasks) > 1
        for shown in (metrics["stages"]["2_sft"], metrics["baselines"]["majority"]):
            assert set(shown["pass@1"]["by_kind"]) == tasks
