"""vLLM serves what the recipes write: the architecture is one of its own, and the weights have the names it reads."""

import re
from pathlib import Path

import pytest
from small_model import tokenizer, weights
from transformers import AutoConfig

from pipeline.models.scratch import ScratchArguments, build_model

WEIGHTS = re.compile(
    r"model\.(embed_tokens\.weight|norm\.weight|layers\.\d+\.((input|post_attention)_layernorm\.weight|"
    r"self_attn\.[qkvo]_proj\.(weight|bias)|mlp\.(gate|up|down)_proj\.weight))|lm_head\.weight"
)
"""The weights of vLLM's LlamaForCausalLM, with `attention_bias` or without it."""


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_a_plain_llama(tmp_path: Path, tied: bool) -> None:
    sizes = ScratchArguments(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    build_model(sizes, tokenizer(), seed=0).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.architectures) == ("llama", ["LlamaForCausalLM"])
    assert config.hidden_act == "silu", "the only activation of vLLM's Llama"
    assert config.rope_parameters["rope_type"] == "default"
    names = weights(tmp_path).keys()
    assert [name for name in names if not WEIGHTS.fullmatch(name)] == []
    assert ("lm_head.weight" in names) is not tied, "vLLM shares the embeddings if the configuration says so"


def test_vllm_knows_the_architectures() -> None:
    vllm = pytest.importorskip("vllm")
    known = vllm.ModelRegistry.get_supported_archs()
    assert {"LlamaForCausalLM", "LlamaForSequenceClassification"} <= set(known)
