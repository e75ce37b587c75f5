"""Models that are broken are refused when they are loaded, in one line that names the field."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pipeline import hardware
from pipeline.errors import UserError
from pipeline.models.adapters import merge_into_base
from pipeline.models.loading import (
    is_reward_model,
    load_config,
    load_model,
    load_tokenizer,
    user_error_for,
)
from tests.word_model import TEMPLATE, word_model_config, word_tokenizer

WORDS = ["where", "is", "fox"]
LAST = "model.layers.0.mlp.up_proj.weight"


def save_model(folder: Path, reward: bool = False, adapter: bool = False) -> Path:
    """Save a small model with random weights, or an adapter to one, with its tokenizer."""
    torch.manual_seed(0)
    kind = LlamaForSequenceClassification if reward else LlamaForCausalLM
    model = kind(word_model_config(WORDS, **({"num_labels": 1} if reward else {})))
    model.save_pretrained(folder.with_name("base") if adapter else folder)
    if adapter:
        model.name_or_path = str(folder.with_name("base"))
        task = "SEQ_CLS" if reward else "CAUSAL_LM"
        get_peft_model(model, LoraConfig(task_type=task, target_modules=["q_proj"])).save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return folder


def change(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refusal(folder: Path, reward: bool = False) -> str:
    with pytest.raises(UserError) as refused:
        load_model(str(folder), "--model", reward=reward)
    message = str(refused.value)
    assert message.startswith(f"--model: {folder}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("machine", ["bf16", "fp32"])
def test_a_model_keeps_its_dtype_unless_the_machine_emulates_it(
    tmp_path: Path, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "precision", lambda: hardware.Choice(machine, ""))
    folder = save_model(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    model, _ = load_model(str(folder), "--model")
    assert model.dtype == (torch.bfloat16 if machine == "bf16" else torch.float32)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("reward", [False, True])
def test_a_sound_model_is_loaded(tmp_path: Path, reward: bool, adapter: bool) -> None:
    folder = save_model(tmp_path / "model", reward, adapter)
    model, tokenizer = load_model(str(folder), "--model", reward=reward)
    assert is_reward_model(load_config(str(folder))) == reward
    assert type(model) is (LlamaForSequenceClassification if reward else LlamaForCausalLM)
    assert len(tokenizer) == model.config.vocab_size


CODE = "evil.Class"
EVIL = """
raise SystemExit("code of a model was run")
"""


@pytest.mark.parametrize("part", ["config", "model", "tokenizer", "base of an adapter"])
def test_code_of_a_model_is_never_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """With `trust_remote_code` unset, transformers asks on stdin, and takes the first line of a pipe for the answer."""
    folder = save_model(tmp_path / "model", adapter=part == "base of an adapter")
    where = tmp_path / "base" if part == "base of an adapter" else folder
    (where / "evil.py").write_text(EVIL)
    if part == "tokenizer":
        edit_json(where / "tokenizer_config.json", auto_map={"AutoTokenizer": [CODE, CODE]}, tokenizer_class="Mine")
        (where / "config.json").unlink()
    else:
        names = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
        mapped = {name: CODE for name in names if part != "model" or name != "AutoConfig"}
        edit_json(where / "config.json", auto_map=mapped, model_type="vit" if part == "model" else "of_its_own")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    for reward in (False, True):
        refusal(folder, reward)
    if part == "base of an adapter":
        with pytest.raises(ValueError, match="custom code"):
            merge_into_base(str(folder))
    assert not asked


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    change(folder / "model.safetensors", lambda weights: weights.pop(LAST))
    assert f"lacks the weights {LAST}" in refusal(folder)
    folder = save_model(tmp_path / "reward", reward=True)
    change(folder / "model.safetensors", lambda weights: weights.pop("score.weight"))
    assert "lacks the weights score.weight" in refusal(folder, reward=True)
    folder = save_model(tmp_path / "adapter", adapter=True)
    change(folder / "adapter_model.safetensors", lambda weights: weights.pop(min(weights)))
    assert "lacks the weights" in refusal(folder)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert f"its base model {tmp_path / 'base'}: does not contain weights" in refusal(folder)


def test_files_of_another_model_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    sizes = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_hidden_layers": 100, "head_dim": 1 << 14}
    edit_json(folder / "config.json", architectures=None, **sizes)
    save_file({"foo": torch.zeros(2)}, folder / "model.safetensors")
    assert "its weight files hold 2 of the" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    folder = save_model(tmp_path / "model")
    change(folder / "model.safetensors", lambda weights: weights[LAST][0, 0].fill_(value))
    assert f"its weights are not finite numbers ({LAST})" in refusal(folder)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    word_tokenizer([*WORDS, "owl", "bee"]).save_pretrained(folder)
    assert "tokens and its tokenizer" in refusal(folder)
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = None
    for file in folder.glob("*template*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    assert "chat template" in refusal(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "no tokenizer can be loaded" in refusal(folder)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('too polite') }}", "too polite"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.first.second }}", "has no attribute"),
        ("{% for message in messages %}{{ message", "unexpected"),
        ("{% if false %}never{% endif %}", "makes no tokens"),
    ],
)
def test_a_template_that_does_not_work_is_refused(tmp_path: Path, template: str, said: str) -> None:
    folder = save_model(tmp_path / "model")
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    message = refusal(folder)
    assert "its chat template does not work" in message and said in message


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"pad_token_id": 10**6}, "cannot be built"),
        ("generation_config.json", {"max_new_tokens": -4}, "max_new_tokens"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "no tokenizer can be loaded"),
        ("tokenizer_config.json", {"eos_token": None}, "no eos token"),
    ],
)
def test_settings_of_a_model_that_cannot_be_are_refused(
    tmp_path: Path, file: str, changes: dict[str, object], said: str
) -> None:
    folder = save_model(tmp_path / "model")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert said in refusal(folder)


def test_a_header_of_more_weights_than_a_model_has_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    size = (5 << 20).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(size + b" " * (5 << 20))
    assert "model.safetensors is damaged (its header has 5,242,880 bytes" in refusal(folder)


def test_an_index_that_names_a_pipe_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pipe.safetensors"}}')
    assert "pipe.safetensors is damaged (is not a file)" in refusal(folder)


@pytest.mark.parametrize("index", ["[]", None])
def test_files_that_are_not_weights_are_refused(tmp_path: Path, index: str | None) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if index is None:
        os.mkfifo(folder / "model.safetensors")
    else:
        (folder / "model.safetensors.index.json").write_text(index)
    assert "does not contain weights" in refusal(folder)


def test_a_reward_model_with_two_labels_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", reward=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_labels": 2}))
    assert "has 2 labels" in refusal(folder, reward=True)


def test_the_wrong_kind_of_model_is_refused(tmp_path: Path) -> None:
    assert "is a reward model" in refusal(save_model(tmp_path / "reward", reward=True))
    assert "lacks the weights score.weight" in refusal(save_model(tmp_path / "model"), reward=True)
    assert "no tokenizer can be loaded" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("special", "pad", "chosen"),
    [
        (["<end>", "<unk>", "<reserved>"], "<end>", "<unk>"),
        (["<end>", "<unk>", "<fill_pad>"], "<end>", "<fill_pad>"),
        (["<end>", "<user>", "<assistant>", "<reserved>"], "<end>", "<reserved>"),  # the template uses the others
        (["<end>", "<reserved>"], None, "<reserved>"),
        (["<end>", "<user>", "<assistant>"], "<end>", "<end>"),  # no other is free
        (["<end>", "<unk>", "<pad>"], "<pad>", "<pad>"),
    ],
)
def test_a_tokenizer_gets_a_pad_token_that_does_not_end_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, special: list[str], pad: str | None, chosen: str
) -> None:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, "Hello", "user"])}, unk_token="user"))
    unknown = "<unk>" if "<unk>" in special else None
    options = {"eos_token": "<end>", "unk_token": unknown, "pad_token": pad, "chat_template": TEMPLATE}
    words = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=special[1:], **options)
    words.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), "tokenizer_name_or_path")
    assert (loaded.pad_token, loaded.eos_token) == (chosen, "<end>")
    assert (f"the tokenizer pads with {chosen}, because" in caplog.text) == (pad != "<pad>")


def test_a_model_without_a_chat_template_is_loaded_with_the_tokenizer_of_another(tmp_path: Path) -> None:
    folder, chat = save_model(tmp_path / "model"), tmp_path / "chat"
    for file in folder.glob("*template*"):
        file.unlink()
    word_tokenizer(WORDS).save_pretrained(chat)
    assert "no chat template" in refusal(folder)
    _, tokenizer = load_model(str(folder), "--model", tokenizer=str(chat))
    assert tokenizer.chat_template == TEMPLATE


def test_headers_are_read_without_torch() -> None:
    """The report counts parameters, and starts in half a second."""
    code = "import sys, pipeline.files; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_long_rows_do_not_announce_errors_that_do_not_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # `chat`, run in this process before, silences it
    words = word_tokenizer(WORDS)
    words.model_max_length = 3
    words.save_pretrained(tmp_path)
    words("fox " * 9)
    assert "indexing errors" in caplog.text
    caplog.clear()
    load_tokenizer(str(tmp_path), "tokenizer_name_or_path")("fox " * 9)
    assert caplog.text == ""


@pytest.mark.parametrize("error", [TypeError("an option that was renamed"), KeyError(None), AttributeError("x")])
def test_a_defect_while_checked_files_are_loaded_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), user_error_for("--model", "x", checked=True):
        raise error
    with pytest.raises(UserError, match="--model: x: no model can be loaded"), user_error_for("--model", "x"):
        raise error


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("gone"), RuntimeError("gone"), UserWarning("gone")])
def test_checked_files_that_cannot_be_loaded_after_all_are_a_user_error(error: Exception) -> None:
    with pytest.raises(UserError, match="gone"), user_error_for("--model", "x", checked=True):
        raise error
