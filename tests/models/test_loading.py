"""Models that are broken are refused when they are loaded, in one line that names the field."""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GitForCausalLM,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pipeline import hardware
from pipeline.errors import UserError
from pipeline.files import bounded
from pipeline.models.adapters import merge_into_base
from pipeline.models.loading import (
    is_reward_model,
    load_config,
    load_model,
    load_tokenizer,
    user_error_for,
    validate_weights,
)
from tests.helpers.word_model import TEMPLATE, word_model_config, word_tokenizer

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


@pytest.mark.parametrize("reward", [False, True])
def test_an_adapter_is_merged_into_the_model_that_is_loaded(tmp_path: Path, reward: bool) -> None:
    folder = save_model(tmp_path / "model", reward, adapter=True)
    change(folder / "adapter_model.safetensors", lambda weights: [weight.normal_() for weight in weights.values()])
    model, _ = load_model(str(folder), "--model", reward=reward)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    kind = AutoPeftModelForSequenceClassification if reward else AutoPeftModelForCausalLM
    adapted = kind.from_pretrained(folder, **({"num_labels": 1} if reward else {}))
    ids = torch.arange(4)[None]
    with torch.no_grad():
        logits, expected = model.eval()(ids).logits, adapted.eval()(ids).logits
        without = type(model).from_pretrained(tmp_path / "base").eval()(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, without, atol=1e-2)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(type(model).from_pretrained(tmp_path / "saved").eval()(ids).logits, logits)


CODE = "evil.Class"
EVIL = """
raise SystemExit("code of a model was run")
"""


@pytest.mark.parametrize("part", ["config", "model", "tokenizer", "base of an adapter"])
def test_code_of_a_model_is_never_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """With `trust_remote_code` unset, transformers asks on stdin, and takes the first line of a pipe for the answer."""
    is_adapter = part == "base of an adapter"
    folder = save_model(tmp_path / "model", adapter=is_adapter)
    infected = tmp_path / "base" if is_adapter else folder
    (infected / "evil.py").write_text(EVIL)
    models = {"AutoModelForCausalLM": CODE, "AutoModelForSequenceClassification": CODE}
    if part == "tokenizer":
        edit_json(infected / "tokenizer_config.json", auto_map={"AutoTokenizer": [CODE, CODE]}, tokenizer_class="Mine")
        (infected / "config.json").unlink()
    elif part == "model":
        # transformers has this type, but no language model of it, and so looks for the class of the model.
        edit_json(infected / "config.json", auto_map=models, model_type="vit")
    else:
        edit_json(infected / "config.json", auto_map={"AutoConfig": CODE, **models}, model_type="of_its_own")
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "y")
    for reward in (False, True):
        refusal(folder, reward)
    if part == "base of an adapter":
        with pytest.raises(ValueError, match="custom code"):
            merge_into_base(str(folder))
    assert not questions


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
    ("template", "fault"),
    [
        ("{{ raise_exception('too polite') }}", "too polite"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.first.second }}", "has no attribute"),
        ("{% for message in messages %}{{ message", "unexpected"),
        ("{% if false %}never{% endif %}", "makes no tokens"),
    ],
)
def test_a_template_that_does_not_work_is_refused(tmp_path: Path, template: str, fault: str) -> None:
    folder = save_model(tmp_path / "model")
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    message = refusal(folder)
    assert "its chat template does not work" in message and fault in message


@pytest.mark.parametrize(
    ("file", "changes", "fault"),
    [
        ("config.json", {"num_hidden_layers": 10**7}, "10000000 layers"),
        ("config.json", {"num_labels": 10**9}, "1000000000 labels"),
        ("config.json", {"id2label": dict.fromkeys(range(70_000), "x")}, "has a list of more than 65,536 entries"),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": ["<x>"] * 200_001},
            "has a list of more than 200,000 entries",
        ),
        ("config.json", {"vision_config": {"num_layers": 10**9}}, "1000000000 layers"),
        ("config.json", {"architectures": [5]}, "`architectures`"),
        ("config.json", {"pad_token_id": 10**6}, "cannot be built"),
        ("generation_config.json", {"max_new_tokens": -4}, "max_new_tokens"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "no tokenizer can be loaded"),
        ("tokenizer_config.json", {"eos_token": None}, "no eos token"),
    ],
)
def test_settings_of_a_model_that_cannot_be_are_refused(
    tmp_path: Path, file: str, changes: dict[str, object], fault: str
) -> None:
    folder = save_model(tmp_path / "model")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert fault in refusal(folder)


DOUBLINGS = "{% set x = namespace(y='x') %}{% for a in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}{{ x.y }}"
LATER = "{% if messages|length > 2 %}{{ 'x' * 10**10 }}{% endif %}{{ messages[0].content }}"


@pytest.mark.parametrize("template", [DOUBLINGS, "{{ 'x' * 10**10 }}", LATER])
def test_a_template_that_fills_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(bounded, "MEMORY", 128 << 20)
    folder = save_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    assert "rendering its chat template takes too much memory" in refusal(folder)


def test_a_template_that_writes_much_of_a_few_words_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ 'x ' * 10000000 }}")
    assert "rendering its chat template gives too long a text" in refusal(folder)


def test_a_template_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    folder = save_model(tmp_path / "model")
    loops = "{% for a in messages[0].content * 9999 %}" * 3 + "{% endfor %}" * 3
    (folder / "chat_template.jinja").write_text(loops)
    assert "rendering its chat template takes too long" in refusal(folder)


def test_a_tokenizer_that_doubles_its_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MEMORY", 128 << 20)
    folder = save_model(tmp_path / "model")
    doubling = {"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}
    edit_json(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [doubling] * 60})
    assert "tokenizing a word takes too" in refusal(folder)


def test_files_that_are_read_as_a_whole_have_a_largest_size(tmp_path: Path) -> None:
    for file, fault in (("tokenizer.json", "64 MiB"), ("config.json", "8 MiB"), ("tokenizer_config.json", "32 MiB")):
        folder = save_model(tmp_path / file / "model")
        # The file is one hole, and takes no space on the disk.
        os.truncate(folder / file, 1 << 34)
        assert f"its {file} is larger than {fault}" in refusal(folder)


def test_what_does_not_count_layers_labels_or_tokens_may_be_large(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    labels = {f"{number}_label": number * 50 for number in range(2000)}
    id2label = {str(number): name for name, number in labels.items()}
    edit_json(folder / "config.json", max_window_layers=2048, label2id=labels, id2label=id2label)
    for file in ("corpus.txt", "best.model"):
        (folder / file).touch()
        os.truncate(folder / file, 1 << 34)
    load_model(str(folder), "--model")


def test_many_added_tokens_are_loaded(tmp_path: Path) -> None:
    """Models of speech have tens of thousands."""
    folder = save_model(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokens = [{"id": 1000 + number, "content": f"<custom_token_{number}>", **token} for number in range(28_672)]
    edit_json(folder / "tokenizer.json", added_tokens=content["added_tokens"] + tokens)
    assert len(load_tokenizer(str(folder), "--model")) > 28_672


def test_added_tokens_that_take_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    folder = save_model(tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=[f"<{number}>" for number in range(60_000)])
    assert "loading its 60,000 added tokens takes too long" in refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_configurations_that_are_not_readable_are_one_line(tmp_path: Path, file: str) -> None:
    folder = save_model(tmp_path / "model")
    for content, fault in (
        ((folder / file).read_text().encode("utf-16"), "is not JSON in UTF-8"),
        (b"[" * 100_000, "is not JSON in UTF-8"),
        (b"null", "is not a JSON object"),
    ):
        (folder / file).write_bytes(content)
        assert f"its {file} {fault}" in refusal(folder)
        with pytest.raises(ValueError, match=fault):
            load_config(str(folder))


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


def test_an_adapter_whose_base_model_is_gone_is_refused(tmp_path: Path) -> None:
    """The paths in an adapter are absolute, so that they are wrong after the run was moved."""
    folder, gone = save_model(tmp_path / "model", adapter=True), tmp_path / "gone"
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(gone))
    assert f"there is no folder {gone}; correct base_model_name_or_path" in refusal(folder)


def test_an_adapter_whose_pattern_of_modules_never_ends_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    folder = save_model(tmp_path / "model", adapter=True)
    edit_json(folder / "adapter_config.json", target_modules="(.*.*)*=(.*.*)*=x")
    assert "adding what its adapter_config.json asks for takes too" in refusal(folder)


def test_an_adapter_is_tried_without_memory_for_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MEMORY", 64 << 20)
    folder = save_model(tmp_path / "model", adapter=True)
    rank = 1 << 22
    edit_json(folder / "adapter_config.json", r=rank)
    file = folder / "adapter_model.safetensors"
    shapes = {
        name: [rank, weight.shape[1]] if "lora_A" in name else [weight.shape[0], rank]
        for name, weight in load_file(file).items()
    }
    write_header(file, shapes)
    assert validate_weights(str(folder), load_config(str(folder)), AutoModelForCausalLM) is None


def write_header(file: Path, shapes: dict[str, list[int]]) -> None:
    """Write a safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


def test_an_adapter_of_a_rank_that_its_weights_do_not_have_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", adapter=True)
    edit_json(folder / "adapter_config.json", r=10**9)
    assert "asks for the rank 1000000000" in refusal(folder)


def test_a_configuration_that_is_large_for_a_reason_is_built(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    edit_json(folder / "config.json", max_position_embeddings=10**9, rope_theta=10**10)
    load_model(str(folder), "--model")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model_type": "gpt_neo", "max_position_embeddings": 10**6, "num_layers": 2}, "in addition to the weights"),
        (
            {"model_type": "git", "hidden_size": 24, "num_image_with_embedding": 10**9},
            "_embedding: 1000000000) takes too",
        ),
    ],
)
def test_a_model_of_endless_parts_or_of_large_buffers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], fault: str
) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    # Importing these classes is not what takes time.
    assert GitForCausalLM and GPTNeoForCausalLM
    folder = save_model(tmp_path / "model")
    attention = {"attention_types": [[["global", "local"], 1]]}
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50, "hidden_size": 16, **attention, **changes}))
    assert fault in refusal(folder)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {"a": 5}}', None])
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
        # The template uses the others.
        (["<end>", "<user>", "<assistant>", "<reserved>"], "<end>", "<reserved>"),
        (["<end>", "<reserved>"], None, "<reserved>"),
        # No other token is free.
        (["<end>", "<user>", "<assistant>"], "<end>", "<end>"),
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
    # `chat` silences this logger, and another test may have run it in this process.
    caplog.set_level(logging.WARNING, "transformers")
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
