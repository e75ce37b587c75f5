"""`python -m pipeline import-gguf FILE.gguf DIR`: convert a file written for llama.cpp into a model to start from.

Weights become float32 (Q5_0 and Q5_1 cannot be read); precision lost to quantisation is not recovered. The tokenizer
makes the same tokens as llama.cpp. When transformers reads such a file itself (`gguf_file=`), the model is marked as
quantised and cannot be saved, and the tokenizer splits numbers as no SmolLM model does, and pads with the end of turn.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict, read_gguf_metadata
from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.errors import Problem, UserError, refuse
from pipeline.files import check_new_directory, write_folder
from pipeline.files.bounded import MAX_LAYERS, check_files, exceeded_limit
from pipeline.launch import quiet_libraries
from pipeline.models.loading import separate_pad_token, user_error_for, validate_chat, validate_finite
from pipeline.models.tokenizer import pre_tokenizer, validate_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Decoders whose logits survive the round trip through `fourstage gguf`."""

WEIGHTS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "blk": "model.layers",
    "attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v")},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in ("q", "k")},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}  # fmt: skip
"""llama.cpp's names for the parts of a decoder -> transformers' names."""

PRE_TOKENIZERS = ("smollm", "gpt-2", "qwen2", "llama-bpe")
"""Pre-tokenizers, by llama.cpp's names, that `tests/interop` compares with llama.cpp's own.

transformers reads any qwen2 tokenizer as Qwen2's own, which first composes accents (NFC), unlike llama.cpp.
"""

REQUIRED = (
    "context_length", "block_count", "feed_forward_length", "embedding_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
"""Settings without which no model can be built, by llama.cpp's names."""

ROPE_DIVISORS = "rope_freqs.weight"
"""In Llama 3.1 and later: the divisors of the rotary embedding's frequencies, of shape (head size / 2,)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="GGUF file of a Llama, Qwen2 or Qwen3")
    parser.add_argument("output_dir", type=Path, help="new directory for the model and its tokenizer")


def main(args: argparse.Namespace) -> int:
    """Read a GGUF file, and save the model with its tokenizer. Return 0."""
    quiet_libraries()
    file, output_dir = args.file, args.output_dir
    if not file.is_file():
        raise UserError(Problem("file", file, "is not a file; name a GGUF file"))
    refuse(check_new_directory(output_dir, "output_dir"))
    with user_error_for("file", file):
        model, tokenizer = read_gguf(file)
    with write_folder(output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with user_error_for("file", file):
            check_files(folder)
    print(f"{output_dir}: a {model.config.model_type} model with {model.num_parameters():,} parameters in float32")
    return 0


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return an untrusted GGUF file's model and tokenizer, or raise anything if it is damaged or of another kind."""
    # The file is memory-mapped, and may be larger than the child's memory limit.
    size = file.stat().st_size
    if fault := exceeded_limit(lambda: read_tokenizer(file), mapped=size):
        raise ValueError(f"making its tokenizer {fault}")
    tokenizer = read_tokenizer(file)
    header = GgufHeader.from_file(str(file))
    if (end := header.data_start + max((info.offset + info.nbytes for info in header.tensors), default=0)) > size:
        raise ValueError(f"it is cut off: {size:,} of at least {end:,} bytes")
    if fault := validate_tokenizer(tokenizer) or (validate_chat(tokenizer) if tokenizer.chat_template else None):
        raise ValueError(fault)
    if tokenizer.eos_token is None:
        raise ValueError("it names no token that ends a text")
    separate_pad_token(tokenizer, str(file))

    metadata, _ = read_gguf_metadata(str(file), ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
    config = read_config(header, metadata, tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        # Sizes that contradict each other are found without the weights.
        model(torch.zeros(1, 2, dtype=torch.long))
    model.load_state_dict(read_weights(header, model), strict=False, assign=True)
    model.tie_weights()
    if fault := validate_finite(model.named_parameters()):
        raise ValueError(fault)
    if tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        model.config.pad_token_id = tokenizer.pad_token_id
        # The new row is random, but the same each time.
        torch.manual_seed(0)
        model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
    # Some chat models end a turn and a text with two tokens.
    ends = {tokenizer.eos_token_id, metadata.get("tokenizer.ggml.eot_token_id", tokenizer.eos_token_id)}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(end for end in ends if end < len(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, tokenizer


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the metadata of a GGUF file describe."""
    _, found, settings = mapping.get_gguf_tokenizer(str(file))
    kind, pre = found.get("tokenizer_type"), found.get("pre_tokenizer_type")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        known = f"only 'gpt2' with {', '.join(PRE_TOKENIZERS)} can be read"
        raise ValueError(f"its tokenizer is {kind!r} with pre-tokenizer {pre!r}; {known}")
    # Llama 3 encodes a word that is a token directly, and adds a token at the beginning unless the file says otherwise.
    is_llama3, vocabulary = pre == "llama-bpe", {token: i for i, token in enumerate(found["tokens"])}
    backend = Tokenizer(models.BPE(vocabulary, mapping.get_merges(found), ignore_merges=is_llama3))
    backend.decoder = decoders.ByteLevel()
    # transformers has patterns for all but GPT-2's.
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizer("bpe") if pre == "smollm" else words
    settings = {"add_bos_token": is_llama3, "add_eos_token": False} | settings
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)
    mapping.add_gguf_special_tokens(mapping.set_split_regex(tokenizer, found), found)
    return tokenizer


def read_config(header: GgufHeader, metadata: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the configuration (a `PreTrainedConfig`) of the model in a GGUF file."""
    kind, names = header.architecture, header.ggml_types
    if kind not in ARCHITECTURES:
        raise ValueError(f"it holds a {kind} model; only {', '.join(ARCHITECTURES)} can be read")
    if kind == "qwen2" and (pre := metadata["tokenizer.ggml.pre"]) != kind:
        raise ValueError(f"its pre-tokenizer is {pre!r}; transformers reads any tokenizer of a qwen2 as Qwen2's own")
    # transformers' names of the settings; three are the same value.
    fields = {**GGUF_CONFIG_MAPPING["llama"], "attention.key_length": "head_dim", "attention.value_length": "head_dim"}
    sizes: dict[str, Any] = {"vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    settings = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    if settings.get("rope.scaling.type") == "none":
        del settings["rope.scaling.type"]
    if unknown := sorted(settings.keys() - fields.keys()):
        raise ValueError(f"it has settings that are not known here ({', '.join(unknown[:3])})")
    for name, value in settings.items():
        if fault := validate_setting(fields[name], value):
            raise ValueError(f"its {kind}.{name} is {value}, but must be {fault}")
        if sizes.setdefault(fields[name], value) != value:
            raise ValueError(f"its {kind}.{name} is {value}, which contradicts its other sizes")
    if missing := [name for name in REQUIRED if name not in settings]:
        raise ValueError(f"it lacks the setting {kind}.{missing[0]}")
    if sizes["num_hidden_layers"] > MAX_LAYERS:
        raise ValueError(f"it asks for {sizes['num_hidden_layers']} layers")
    # The file stores single precision: 1e-5 would be read as 9.999999747378752e-06.
    theta, epsilon = (float(str(np.float32(v))) for v in (sizes.pop("rope_theta", 10000.0), sizes.pop("rms_norm_eps")))
    heads = sizes["num_attention_heads"]
    config = AutoConfig.for_model(
        kind,
        **{"num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads} | sizes,
        rms_norm_eps=epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # A Qwen2 always has the same biases.
    for setting, weight in {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}.items():
        if hasattr(config, setting):
            setattr(config, setting, weight in names)
    if ROPE_DIVISORS not in names:
        return config
    # The file only has the divisors. All releases of Llama 3 share the other settings.
    divisors = load_gguf_state_dict(header)[ROPE_DIVISORS][...].float()
    config.rope_parameters |= {
        "rope_type": "llama3",
        "factor": divisors.max().item(),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    if divisors.shape != scaled.shape or not torch.allclose(plain / scaled, divisors, rtol=1e-4):
        raise ValueError(f"its {ROPE_DIVISORS} is not Llama 3's")
    return config


def validate_setting(field: str, value: Any) -> str | None:
    """Return what the value of a configuration's field must be, as the end of a sentence, or None if it is that."""
    if field not in ("rope_theta", "rms_norm_eps"):
        return None if type(value) is int and value > 0 else "a positive whole number"
    if type(value) not in (int, float) or not np.isfinite(np.float32(value)):
        return "a finite number"
    # With less than 1, the frequencies would grow from one dimension to the next.
    if field == "rope_theta":
        return None if value >= 1 else "at least 1"
    # With 0, a row of zeros would become NaN.
    return None if value > 0 else "positive"


def read_weights(header: GgufHeader, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights in a GGUF file in float32, under the names of a model on the meta device, which must match."""
    config = model.config
    tensors = [info for info in header.tensors if info.name != ROPE_DIVISORS]
    own = {info.name: ".".join(WEIGHTS.get(part, part) for part in info.name.split(".")) for info in tensors}
    found = {own[info.name]: list(info.shape) for info in tensors}
    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    if wrong := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        here = f"has the shape {found[wrong[0]]}" if wrong[0] in found else "is missing"
        there = f"is {wanted[wrong[0]]}" if wrong[0] in wanted else "has none"
        raise ValueError(f"its {wrong[0]} {here}, and a {config.model_type} of its sizes {there}")
    stored, weights = load_gguf_state_dict(header), {}
    for name in own:
        values, kind = stored[name][...], stored[name].ggml_type
        values, shape = dequantize(values, kind) if kind in GGML_BLOCK else values.float(), wanted[own[name]]
        # llama.cpp rotates neighbours where transformers rotates halves, and stores the rows of a Llama in that order.
        if config.model_type == "llama" and (".attn_q." in name or ".attn_k." in name):
            values = values.reshape(-1, config.head_dim // 2, 2, *shape[1:]).transpose(1, 2)
        weights[own[name]] = values.reshape(shape)
    return weights
