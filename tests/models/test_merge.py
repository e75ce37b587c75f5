"""`python -m pipeline merge`: the merged model gives what the adapter gives; broken adapters are refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

from pipeline.__main__ import main
from tests.helpers.refusals import refused

WORDS = ["<pad>", "the", "cat", "sat", "on", "a", "mat"]
CONFIG = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def save_adapter(directory: Path, task: str) -> Path:
    """A base model and an adapter to it whose weights all differ from their initial values."""
    torch.manual_seed(0)
    if task == "SEQ_CLS":
        base = LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1))
    else:
        base = LlamaForCausalLM(LlamaConfig(**CONFIG))
    base.save_pretrained(directory / "base")
    # A critic starts from a language model.
    if task == "TOKEN_CLS":
        base = LlamaForTokenClassification.from_pretrained(directory / "base", num_labels=1)
    base.name_or_path = str(directory / "base")
    model = get_peft_model(base, LoraConfig(task_type=task, r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory / "adapter")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(directory / "adapter")
    return directory / "adapter"


@pytest.mark.parametrize(
    ("task", "load_adapter", "load_merged"),
    [
        ("CAUSAL_LM", AutoPeftModelForCausalLM, AutoModelForCausalLM),
        ("SEQ_CLS", AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification),
        ("TOKEN_CLS", AutoPeftModelForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_the_merged_model_gives_what_the_adapter_gives(
    tmp_path: Path, task: str, load_adapter: type, load_merged: type
) -> None:
    adapter = save_adapter(tmp_path, task)
    assert main(["merge", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 0
    options = {} if task == "CAUSAL_LM" else {"num_labels": 1}
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    with torch.no_grad():
        expected = load_adapter.from_pretrained(str(adapter), **options).eval()(ids).logits
        merged = load_merged.from_pretrained(str(tmp_path / "merged"))
        base = load_merged.from_pretrained(str(tmp_path / "base"))
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(base(ids).logits, expected, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "merged"))
    assert tokenizer.convert_tokens_to_ids("mat") == WORDS.index("mat")
    assert {path.suffix for path in (tmp_path / "merged").iterdir()} == {".json", ".safetensors"}


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "merge", tmp_path, "--output_dir", tmp_path / "merged")
    assert message.startswith(f"adapter: {tmp_path}: does not contain adapter_config.json")
    assert not (tmp_path / "merged").exists()


def test_a_base_model_that_is_gone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tmp_path, "CAUSAL_LM")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    message = refused(capsys, "merge", adapter, "--output_dir", tmp_path / "merged")
    assert f"adapter: {tmp_path / 'base'}: no base model can be loaded from it" in message
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    adapter = save_adapter(tmp_path, "CAUSAL_LM")
    file = tmp_path / part / ("adapter_model.safetensors" if part == "adapter" else "model.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    assert f"adapter: {adapter}: " in refused(capsys, "merge", adapter, "--output_dir", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a directory that even root cannot write to")
def test_an_unwritable_directory_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(tmp_path, "CAUSAL_LM")
    monkeypatch.setattr("pipeline.models.loading.load_tokenizer", None)
    message = refused(capsys, "merge", adapter, "--output_dir", "/proc/merged")
    assert "--output_dir: /proc/merged: no permission to write to /proc" in message


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "peft_type"])
def test_an_incomplete_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    adapter = save_adapter(tmp_path, "CAUSAL_LM")
    if missing == "peft_type":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, missing: "PROMPT_TUNING"}))
    else:
        (adapter / missing).unlink()
    error = refused(capsys, "merge", adapter, "--output_dir", tmp_path / "merged")
    assert error.startswith("adapter:") and error.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def test_a_directory_below_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tmp_path, "CAUSAL_LM")
    message = refused(capsys, "merge", adapter, "--output_dir", adapter / "adapter_config.json" / "merged")
    assert "adapter_config.json is not a directory" in message


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tmp_path, "CAUSAL_LM")
    assert "is not empty" in refused(capsys, "merge", adapter, "--output_dir", tmp_path / "base")
