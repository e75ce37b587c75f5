"""What is wrong in the libraries, and worked around here: each test fails as soon as a release has corrected it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKED_AROUND = {
    "the_auxiliary_loss_is_in_the_loss": "transformers: Llama4ForCausalLM ignores router_aux_loss_coef",
    "the_base_model_is_the_backbone": "transformers: Llama4ForCausalLM.base_model_prefix names no attribute",
    "trl_fine_tunes_it": "TRL: the fused head asks for config.num_experts, which is num_local_experts",
    "layers_are_balanced_one_by_one": "transformers: load_balancing_loss_func pools all layers",
    "muon_takes_experts": "torch: Muon takes matrices only",
    "lora_on_all_linear_layers_computes": "PEFT: all-linear includes the router, which returns a tuple",
    "lora_on_projections_trains_the_experts": "PEFT: target_modules does not reach parameters of experts",
    "it_classifies_texts": "transformers: there is no Llama4ForSequenceClassification",
    "temperature_follows_the_positions": "transformers: the temperature counts from the start of a row",
}


@pytest.fixture(scope="module")
def reproductions() -> dict[str, str | None]:
    """What each reproduction found, in a process that imports nothing of this project."""
    script = Path(__file__).with_name("llama4.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=script.parent)
    result: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_every_reproduction_is_listed(reproductions: dict[str, str | None]) -> None:
    assert set(reproductions) == set(WORKED_AROUND)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=why)) for name, why in WORKED_AROUND.items()],
)
def test_a_library_is_correct(reproductions: dict[str, str | None], name: str) -> None:
    assert reproductions[name] is None, reproductions[name]


def test_trl_trains_on_advantages_per_token() -> None:
    """Not wrong, but untested there."""
    script = Path(__file__).with_name("advantages.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)], check=False)
    assert done.returncode == 0
