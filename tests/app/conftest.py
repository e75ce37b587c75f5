"""A run whose every text attacks the page, with models so small that they answer at once."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaForSequenceClassification, LlamaForTokenClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from pipeline.app import cli
from pipeline.app.models import Models
from pipeline.app.site import Site
from tests.helpers.fake_run import write_run
from tests.helpers.files import write_rows
from tests.helpers.small_model import save_model, save_tokenizer

SAMPLED = {"max_completion_length": 8, "temperature": 1.0, "learning_rate": 1e-3, "epsilon": 0.2, "max_grad_norm": 1.0}
SAMPLED |= {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "per_device_train_batch_size": 4}
ARGUMENTS = {
    "3_ppo": SAMPLED
    | {"model_name_or_path": "old/run/2_sft", "reward_model_path": ["old/run/3_reward"], "kl_coef": 0.5, "gamma": 1.0}
    | {"lam": 0.9, "missing_eos_penalty": 1.0},
    "4_grpo": SAMPLED | {"model_name_or_path": "old/run/3_ppo", "reward_funcs": ["exact_answer"], "num_generations": 4},
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hostile run, moved from where it was trained."""
    run = write_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=True)
    rows = [{"prompt": [{"role": "user", "content": f"What is {i} and {i}?"}], "answer": str(2 * i)} for i in range(9)]
    write_rows(run / "rows.jsonl", rows)
    for seed, stage in enumerate(("0_random", "1_pretrain", "2_sft", "3_ppo", "4_grpo")):
        save_model(run / stage, seed)
    for stage, values in ARGUMENTS.items():
        data = {"dataset_name": "old/run/rows.jsonl", "output_dir": f"old/run/{stage}"}
        (run / stage / "arguments.json").write_text(json.dumps(values | data))
    for kind, folder in (
        (LlamaForSequenceClassification, run / "3_reward"),
        (LlamaForTokenClassification, run / "3_ppo" / "value_model"),
    ):
        kind(AutoConfig.from_pretrained(run / "2_sft", num_labels=1)).save_pretrained(folder)
    save_tokenizer(run / "3_reward")
    return run


@pytest.fixture(scope="session")
def site_of() -> Callable[..., Site]:
    """What makes the site of a run, by the options of the command line."""

    def make(run: Path, *options: str) -> Site:
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        args = parser.parse_args([str(run), *options])
        return Site(run, Models(run, args.model), args)

    return make
