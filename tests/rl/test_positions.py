"""A text's padding changes nothing that is computed for it, whatever the kind of its positions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from pipeline.rl.ppo import PPOTrainer
from tests.helpers import ppo_toy as toy

TEXTS = [(1, 4), (7, 2), (3, 5), (5, 1)]
"""Numbers of tokens of prompt and completion."""


def learned_positions() -> PreTrainedModel:
    """Build a model whose output depends much on the position."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=15, n_positions=64, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config)
    model.transformer.wpe.weight.data.normal_()
    return model


def batch() -> tuple[Tensor, Tensor, int]:
    """Return token ids, attention mask, and the number of columns of the completions."""
    before, after = (max(column) for column in zip(*TEXTS, strict=True))
    mask = torch.tensor([[0] * (before - p) + [1] * (p + c) + [0] * (after - c) for p, c in TEXTS])
    ids = torch.randint(5, 15, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids * mask, mask, after


@pytest.fixture(params=[toy.policy, learned_positions], ids=["llama", "gpt2"])
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> PPOTrainer:
    """Return a trainer whose policy, reference and critic differ."""
    ppo = PPOTrainer(
        request.param(), toy.share_of_red, toy.config(tmp_path), toy.prompts(), processing_class=toy.tokenizer()
    )
    torch.manual_seed(1)
    # The head starts at zero.
    for parameter in [*ppo.value_model.children()][-1].parameters():
        torch.nn.init.normal_(parameter)
    for parameter in ppo.ref_model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for model in (ppo.model, ppo.ref_model, ppo.value_model):
        model.eval()
    return ppo


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("path", ["whole logits", "tiles of TRL"])
def test_padding_changes_nothing(
    trainer: PPOTrainer, path: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities, entropies, those of the reference, and the critic's estimates."""
    # Weights that FSDP splits are not whole.
    monkeypatch.setattr(trainer, "_is_plain", path == "whole logits")

    @torch.no_grad()
    def computed(ids: Tensor, mask: Tensor, length: int, size: int | None) -> list[Tensor]:
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, size, True)
        reference, _, _ = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, mask, length, size)
        return [logps, entropies, reference, trainer._values(ids, mask, length, size)]

    ids, mask, length = batch()
    together = computed(ids, mask, length, batch_size)
    for row, (_, completion) in enumerate(TEXTS):
        text = ids[row, mask[row] > 0].unsqueeze(0)
        alone = computed(text, torch.ones_like(text), completion, None)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[row, :completion], b[0], rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_what_is_sampled(trainer: PPOTrainer) -> None:
    trainer.generation_config.do_sample = False
    prompts = [[5 + (3 * row + column) % 10 for column in range(n)] for row, (n, _) in enumerate(TEXTS)]
    together, _ = trainer._generate_single_turn(prompts, None, {}, 1)
    alone = [trainer._generate_single_turn([prompt], None, {}, 1)[0][0] for prompt in prompts]
    assert together == alone
