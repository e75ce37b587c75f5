"""Minimal reproductions of what keeps a Llama 4 from being trained with transformers, TRL, PEFT and torch alone.

They use nothing of this project, so that each can be pasted into an issue of the library. `python llama4.py` prints
JSON: for each function, what is wrong, or null.
"""

import json
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import SFTConfig, SFTTrainer

IDS = torch.arange(1, 13)[None]


def config(**options: Any) -> Llama4TextConfig:
    return Llama4TextConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        initializer_range=0.5,
        pad_token_id=0,
        **options,
    )


def model(**options: Any) -> Llama4ForCausalLM:
    torch.manual_seed(0)
    return Llama4ForCausalLM(config(**options)).eval()


def the_auxiliary_loss_is_in_the_loss() -> None:
    plain = model()(input_ids=IDS, labels=IDS).loss
    balanced = model(output_router_logits=True, router_aux_loss_coef=10.0)(input_ids=IDS, labels=IDS).loss
    assert balanced > plain + 1, "router_aux_loss_coef has no effect"


def the_base_model_is_the_backbone() -> None:
    language_model = model()
    assert language_model.base_model is language_model.model, "base_model is the language model itself"


def trl_fine_tunes_it() -> None:
    words = Tokenizer(WordLevel({"[PAD]": 0, "a": 1, "b": 2, "[EOS]": 3}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no")
        data = Dataset.from_list([{"text": "a b"}] * 8)
        trained = model()
        # Without this prefix, `base_model` is the language model itself.
        trained.base_model_prefix = "model"
        SFTTrainer(trained, args, train_dataset=data, processing_class=tokenizer).train()


def layers_are_balanced_one_by_one() -> None:
    # One layer sends all tokens to the first expert, the other one to the second.
    first = torch.tensor([[9.0, 0.0]] * 8)
    pooled = load_balancing_loss_func((first, first.flip(1)), 2, 1)
    assert pooled > 1.5, f"two layers that are skewed cancel out: {pooled:.2f}, as if they were balanced"


def muon_takes_experts() -> None:
    torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 4, 4))], lr=0.1)


def lora_on_all_linear_layers_computes() -> None:
    get_peft_model(model(), LoraConfig(target_modules="all-linear"))(input_ids=IDS)


def lora_on_projections_trains_the_experts() -> None:
    targets = LoraConfig(target_modules=["gate_up_proj", "down_proj"])
    adapted = get_peft_model(model(), targets)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any(".experts." in name for name in trained), "the experts stay frozen, and nothing says so"


def it_classifies_texts() -> None:
    AutoModelForSequenceClassification.from_config(config())


def temperature_follows_the_positions() -> None:
    tuned = model(no_rope_layers=[0, 0], attention_chunk_size=None, floor_scale=2, attn_scale=1.0)
    alone = tuned(input_ids=IDS[:, 6:]).logits
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    packed = tuned(input_ids=IDS, position_ids=positions).logits[:, 6:]
    assert torch.allclose(alone, packed, atol=1e-3), "a packed document has the temperature of its place in the row"


REPRODUCTIONS: list[Callable[[], None]] = [
    the_auxiliary_loss_is_in_the_loss,
    the_base_model_is_the_backbone,
    trl_fine_tunes_it,
    layers_are_balanced_one_by_one,
    muon_takes_experts,
    lora_on_all_linear_layers_computes,
    lora_on_projections_trains_the_experts,
    it_classifies_texts,
    temperature_follows_the_positions,
]


def main() -> None:
    results: dict[str, str | None] = {}
    for reproduction in REPRODUCTIONS:
        try:
            reproduction()
            results[reproduction.__name__] = None
        except Exception as error:  # noqa: BLE001 - whatever the library raises
            results[reproduction.__name__] = repr(error)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
