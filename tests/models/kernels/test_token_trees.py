"""A classifier computes texts without padding, and their common beginnings once."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pipeline.models.kernels.token_trees import share_beginnings
from tests.helpers import ppo_toy as toy

LENGTHS = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(30) < LENGTHS[:, None]).long()
IDS = torch.randint(3, 15, MASK.shape, generator=torch.Generator().manual_seed(1)) * MASK
# Pairs of answers: texts that differ from the eleventh token on at the earliest.
OTHERS = IDS[:100].where(torch.arange(30) < 10, (IDS[:100] + 1) % 12 + 3) * MASK[:100]
PAIRS = torch.cat([IDS[:100], OTHERS])


def judge(adapted: bool) -> Any:
    """Return a reward model, perhaps with an adapter, which reports how many tokens it computes."""
    model: Any = toy.reward_model()
    if adapted:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="SEQ_CLS"))
    model.tokens = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: model.tokens.append(inputs[0].numel()))
    return model.eval()


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("ids", "share"), [(IDS, 1.3), (PAIRS, 0.95)], ids=["texts", "pairs"])
def test_scores_and_gradients_are_those_of_one_batch(ids: torch.Tensor, share: float, adapted: bool) -> None:
    plain, shared = judge(adapted), judge(adapted)
    share_beginnings(shared)
    mask = (ids > 0).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    for model in (plain, shared):
        model(**inputs).logits.square().sum().backward()
    for (name, weight), (_, shared_weight) in zip(plain.named_parameters(), shared.named_parameters(), strict=True):
        if weight.grad is not None:
            torch.testing.assert_close(shared_weight.grad, weight.grad, msg=lambda text, name=name: f"{name}: {text}")
    with torch.inference_mode():
        torch.testing.assert_close(shared(**inputs).logits, plain(**inputs).logits)
    assert sum(shared.tokens) < 2 * share * mask.sum() < 2 * 0.8 * ids.numel()


def test_unusual_inputs_are_computed_as_without_passes() -> None:
    plain, shared = judge(adapted=False), judge(adapted=False)
    share_beginnings(shared)
    embeds = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    empty = {"input_ids": IDS[:4], "attention_mask": MASK[:4] * torch.tensor([1, 0, 1, 1])[:, None]}
    with torch.inference_mode():
        for inputs in ({"inputs_embeds": embeds, "attention_mask": torch.ones(2, 5)}, {"input_ids": IDS[:1]}):
            assert torch.equal(shared(**inputs).logits, plain(**inputs).logits)
        rows = torch.tensor([0, 2, 3])
        torch.testing.assert_close(shared(**empty).logits[rows], plain(**empty).logits[rows])
