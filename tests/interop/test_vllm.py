"""vLLM serves what the recipes write: the architecture is one of its own, and the weights have the names it reads."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from pipeline.models.scratch import ScratchArguments, build_model
from tests.helpers.small_model import tokenizer, weights

ATTENTION = {"llama": r"[qkvo]_proj\.(weight|bias)", "qwen3": r"[qkvo]_proj\.weight|[qk]_norm\.weight"}
WEIGHTS = {
    kind: re.compile(
        r"model\.(embed_tokens\.weight|norm\.weight|layers\.\d+\.((input|post_attention)_layernorm\.weight|"
        rf"self_attn\.({names})|mlp\.(gate|up|down)_proj\.weight))|lm_head\.weight"
    )
    for kind, names in ATTENTION.items()
}
"""The weights of vLLM's LlamaForCausalLM, with `attention_bias` or without it, and of its Qwen3ForCausalLM."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "architecture"), [("llama", "LlamaForCausalLM"), ("qwen3", "Qwen3ForCausalLM")])
def test_a_model_is_a_plain_one_of_its_kind(tmp_path: Path, tied: bool, kind: Any, architecture: str) -> None:
    sizes = ScratchArguments(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        attention_bias=kind == "llama",
        model_type=kind,
        tie_word_embeddings=tied,
    )
    build_model(sizes, tokenizer(), seed=0).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.architectures) == (kind, [architecture])
    assert config.hidden_act == "silu", "the only activation of vLLM's Llama and Qwen3"
    assert config.rope_parameters["rope_type"] == "default"
    names = weights(tmp_path).keys()
    assert [name for name in names if not WEIGHTS[kind].fullmatch(name)] == []
    assert ("lm_head.weight" in names) is not tied, "vLLM shares the embeddings if the configuration says so"


def test_vllm_knows_the_architectures() -> None:
    vllm = pytest.importorskip("vllm")
    architectures = vllm.ModelRegistry.get_supported_archs()
    assert {"LlamaForCausalLM", "LlamaForSequenceClassification", "Qwen3ForCausalLM"} <= set(architectures)
