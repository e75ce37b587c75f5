"""A classifier computes texts of similar length together."""

import torch

from pipeline.models.kernels.token_trees import share_beginnings
from tests import ppo_toy as toy

LENGTHS = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(30) < LENGTHS[:, None]).long()
IDS = torch.randint(3, 15, MASK.shape, generator=torch.Generator().manual_seed(1)) * MASK


def test_scores_and_gradients_are_those_of_one_batch() -> None:
    judge, grouped = toy.reward_model().eval(), toy.reward_model().eval()
    tokens: list[int] = []
    grouped.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel()))
    share_beginnings(grouped)
    for model in (judge, grouped):
        model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits.square().sum().backward()
    with torch.inference_mode():
        inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
        torch.testing.assert_close(grouped(**inputs).logits, judge(**inputs).logits)
    for (name, one), (_, other) in zip(judge.named_parameters(), grouped.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert sum(tokens) < 2 * 1.3 * LENGTHS.sum() < 2 * 0.8 * IDS.numel()
