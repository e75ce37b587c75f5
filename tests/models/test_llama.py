"""The model from scratch: it fits its tokenizer, its seed decides its weights, wrong sizes are refused."""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from pipeline.config.parser import parse
from pipeline.data.arguments import DataArguments
from pipeline.errors import UserError
from pipeline.models.scratch import ScratchArguments, build_model, log_model
from pipeline.training.optimizer import OptimizerArguments
from recipes.untrained import main
from tests.helpers.small_model import tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}


def test_vocabulary_and_special_ids_are_those_of_the_tokenizer() -> None:
    model, words = build_model(ScratchArguments(**SIZES), tokenizer(), seed=0), tokenizer()
    assert model.config.vocab_size == len(words) == model.get_input_embeddings().num_embeddings
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == words.pad_token_id
        assert config.bos_token_id == words.bos_token_id
        assert config.eos_token_id == words.eos_token_id
    assert len({words.pad_token_id, words.bos_token_id, words.eos_token_id}) == 3


def test_the_seed_decides_the_weights_and_nothing_else_does() -> None:
    models = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(global_seed)
        models.append(build_model(ScratchArguments(**SIZES), tokenizer(), seed).state_dict())
    first, same, third = models
    assert first.keys() == same.keys() and all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], third["model.embed_tokens.weight"])


def test_the_global_random_state_is_left_alone() -> None:
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state())
    build_model(ScratchArguments(**SIZES), tokenizer(), seed=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])


def test_fields_become_the_configuration() -> None:
    args = ScratchArguments(
        **SIZES,
        intermediate_size=48,
        num_key_value_heads=2,
        rope_theta=500.0,
        attention_bias=True,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    model = build_model(args, tokenizer(), seed=0)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (32, 32)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (16, 32), "half as many heads"
    assert attention.k_proj.bias is not None
    assert model.model.layers[0].mlp.gate_proj.weight.shape == (48, 32)
    assert len(model.model.layers) == 2
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 500.0
    assert model.config.max_position_embeddings == 128
    assert 0.4 < model.model.embed_tokens.weight.std() < 0.6
    assert model.dtype == torch.float32


def test_unset_sizes_follow_from_the_others() -> None:
    model = build_model(ScratchArguments(hidden_size=96, num_attention_heads=4), tokenizer(), seed=0)
    # The default is 8/3 of the hidden size.
    assert model.config.intermediate_size == 256
    assert model.config.num_key_value_heads == 4
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.bias is None


def test_a_qwen3_is_a_llama_with_norms_of_queries_and_keys() -> None:
    llama, qwen3 = (
        build_model(ScratchArguments(**SIZES, model_type=kind), tokenizer(), seed=0).eval()
        for kind in ("llama", "qwen3")
    )
    norms = {name for name, _ in qwen3.named_parameters()} - {name for name, _ in llama.named_parameters()}
    assert len(norms) == 2 * SIZES["num_hidden_layers"] and all("q_norm" in name or "k_norm" in name for name in norms)
    for layer in qwen3.model.layers:
        layer.self_attn.q_proj.weight.data *= 50
    tokens = torch.arange(10, 30)[None]
    scaled = qwen3(tokens).logits
    for layer in qwen3.model.layers:
        layer.self_attn.q_proj.weight.data /= 50
    # The norms' epsilon, 1e-6, is the rest.
    assert torch.allclose(scaled, qwen3(tokens).logits, atol=1e-3)
    with pytest.raises(UserError, match="attention_bias"):
        ScratchArguments(**SIZES, model_type="qwen3", attention_bias=True)


def test_embeddings_share_their_mean_and_keep_their_spread() -> None:
    plain, shifted = (build_model(ScratchArguments(**SIZES, embedding_mean=m), tokenizer(), 0) for m in (0.0, 0.5))
    weights = [model.get_input_embeddings().weight for model in (plain, shifted)]
    assert torch.allclose(weights[1] - weights[0], torch.tensor(0.5)) and shifted.lm_head.weight is weights[1]
    outputs = [
        [weight for name, weight in model.named_parameters() if "embed" not in name] for model in (plain, shifted)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*outputs, strict=True))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_attention_is_causal(kind: Any) -> None:
    args = ScratchArguments(**SIZES, model_type=kind, initializer_range=0.3)
    model = build_model(args, tokenizer(), seed=0).eval()
    tokens = torch.arange(10, 30)[None]
    changed = tokens.clone()
    changed[0, 12] = 40
    with torch.no_grad():
        logits, changed_logits = model(tokens).logits[0], model(changed).logits[0]
    assert torch.equal(logits[:12], changed_logits[:12])
    assert not torch.allclose(logits[12:], changed_logits[12:])


def test_all_wrong_sizes_are_reported_at_once() -> None:
    sizes = ["--hidden_size", "30", "--num_hidden_layers", "0", "--num_attention_heads", "4"]
    with pytest.raises(UserError) as refused:
        parse(ScratchArguments, argv=[*sizes, "--num_key_value_heads", "3"])
    assert {problem.field: problem.remedy for problem in refused.value.problems} == {
        "num_hidden_layers": "must be between 1 and 1,024",
        "hidden_size": "must be a multiple of 2 x num_attention_heads (8)",
        "num_key_value_heads": "must be a divisor of num_attention_heads (4)",
    }


def test_sizes_that_do_not_fit_together_are_reported_at_once() -> None:
    with pytest.raises(UserError) as refused:
        ScratchArguments(hidden_size=30, num_attention_heads=4, num_key_value_heads=3)
    remedies = {problem.field: problem.remedy for problem in refused.value.problems}
    assert remedies == {
        "hidden_size": "must be a multiple of 2 x num_attention_heads (8)",
        "num_key_value_heads": "must be a divisor of num_attention_heads (4)",
    }
    with pytest.raises(UserError, match=r"^num_key_value_heads: 8: "):
        ScratchArguments(num_attention_heads=4, num_key_value_heads=8)


def test_the_log_reports_size_cost_and_dtype(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {**SIZES, "hidden_size": 64}
    with caplog.at_level(logging.INFO):
        for tied in (True, False):
            model = build_model(ScratchArguments(**sizes, tie_word_embeddings=tied), tokenizer(), seed=0)
            log_model(model)
    tied_log, untied_log = (record.getMessage() for record in caplog.records)
    assert "LlamaForCausalLM" in tied_log and "float32" in tied_log and "tied" in tied_log
    assert "tied" not in untied_log
    cost = [log.split(" MFLOPs")[0].rsplit(" ", 1)[1] for log in (tied_log, untied_log)]
    assert cost[0] == cost[1], "tied or not, a token is predicted by one matrix"


def test_stage_zero_is_the_model_that_pretraining_starts_from(tmp_path: Path) -> None:
    words, output = tmp_path / "tokenizer", tmp_path / "0_random"
    tokenizer().save_pretrained(words)
    data_args = DataArguments(tokenizer_name_or_path=str(words))
    args = ScratchArguments(**SIZES)
    main(data_args, TrainingArguments(str(output), seed=7, use_cpu=True), args, OptimizerArguments())
    saved = AutoModelForCausalLM.from_pretrained(output).state_dict()
    built = build_model(args, tokenizer(), seed=7).state_dict()
    assert all(torch.equal(saved[name], built[name]) for name in built)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer().get_vocab()
