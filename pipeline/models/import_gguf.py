"""`python -m pipeline import-gguf FILE.gguf DIR`: convert a file written for llama.cpp into a model to start from.

Weights become float32 (Q5_0 and Q5_1 cannot be read); precision lost to quantisation is not recovered. The tokenizer
makes the same tokens as llama.cpp.

transformers reads the header, the values and the metadata. Its conversion of a whole Llama or Qwen (`gguf_file=`) is
not used, because it needs the package gguf and marks the model as quantised, so that it cannot be saved. Moreover, it
ignores the divisors of Llama 3's frequencies, leaves the biases of queries and keys in llama.cpp's order, fails for
heads that are wider than their share of the hidden size, and makes a tokenizer that splits numbers as no SmolLM model
does, and pads with the end of turn.
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
from pipeline.models.loading import user_error_for, validate_chat
from pipeline.models.tokenizer import pre_tokenizer, separate_pad_token, validate_tokenizer
from pipeline.models.weights import validate_finite

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
    """Read a GGUF file, and save the model with its tokenizer. Return 0.

    Raises:
        UserError: If the file cannot be read, or `output_dir` is not a new directory.
    """
    quiet_libraries()
    file = args.file
    output_dir = args.output_dir
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
    tokenizer = read_untrusted_tokenizer(file)
    header = GgufHeader.from_file(str(file))
    size = file.stat().st_size
    # Where the last tensor ends.
    end = header.data_start
    for tensor in header.tensors:
        end = max(end, header.data_start + tensor.offset + tensor.nbytes)
    if end > size:
        raise ValueError(f"it is cut off: {size:,} of at least {end:,} bytes")

    metadata, _ = read_gguf_metadata(str(file), ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
    config = read_config(header, metadata, tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        # A forward pass without weights fails if sizes contradict each other.
        model(torch.zeros(1, 2, dtype=torch.long))
    model.load_state_dict(read_weights(header, model), strict=False, assign=True)
    model.tie_weights()
    if fault := validate_finite(model.named_parameters()):
        raise ValueError(fault)
    if tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        model.config.pad_token_id = tokenizer.pad_token_id
        # The embedding of the new token is random, but the same each time.
        torch.manual_seed(0)
        model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
    # Some chat models end a turn with another token than a text.
    end_tokens = {tokenizer.eos_token_id, metadata.get("tokenizer.ggml.eot_token_id", tokenizer.eos_token_id)}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(token for token in end_tokens if token < len(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, tokenizer


def read_untrusted_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file, with a pad token if it has one to spare; first try it in a child process.

    Raises:
        ValueError: If it exceeds the limits of `files.bounded`, ends no text, or its chat template does not work.
    """
    # The file is memory-mapped, and may be larger than the child's memory limit.
    if fault := exceeded_limit(lambda: read_tokenizer(file), mapped=file.stat().st_size):
        raise ValueError(f"making its tokenizer {fault}")
    tokenizer = read_tokenizer(file)
    fault = validate_tokenizer(tokenizer)
    if fault is None and tokenizer.chat_template:
        fault = validate_chat(tokenizer)
    if fault is not None:
        raise ValueError(fault)
    if tokenizer.eos_token is None:
        raise ValueError("it names no token that ends a text")
    separate_pad_token(tokenizer, str(file))
    return tokenizer


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the metadata of a GGUF file describe."""
    _, content, settings = mapping.get_gguf_tokenizer(str(file))
    kind = content.get("tokenizer_type")
    pre = content.get("pre_tokenizer_type")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        remedy = f"only 'gpt2' with {', '.join(PRE_TOKENIZERS)} can be read"
        raise ValueError(f"its tokenizer is {kind!r} with pre-tokenizer {pre!r}; {remedy}")
    # Llama 3 encodes a word that is a token directly, and adds a token at the beginning unless the file says otherwise.
    is_llama3 = pre == "llama-bpe"
    vocabulary = {token: number for number, token in enumerate(content["tokens"])}
    backend = Tokenizer(models.BPE(vocabulary, mapping.get_merges(content), ignore_merges=is_llama3))
    backend.decoder = decoders.ByteLevel()
    # For qwen2 and llama-bpe, `set_split_regex` below replaces this. transformers has no pattern for the other two:
    # SmolLM's splits off digits, and GPT-2's is built into ByteLevel.
    if pre == "smollm":
        backend.pre_tokenizer = pre_tokenizer("bpe")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    settings = {"add_bos_token": is_llama3, "add_eos_token": False} | settings
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)
    mapping.add_gguf_special_tokens(mapping.set_split_regex(tokenizer, content), content)
    return tokenizer


def read_config(header: GgufHeader, metadata: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the configuration (a `PreTrainedConfig`) of the model in a GGUF file.

    Raises:
        ValueError: If it is of another architecture, or a setting is unknown, missing, or no model can have it.
    """
    kind = header.architecture
    names = header.ggml_types
    if kind not in ARCHITECTURES:
        raise ValueError(f"it holds a {kind} model; only {', '.join(ARCHITECTURES)} can be read")
    pre = metadata["tokenizer.ggml.pre"]
    if kind == "qwen2" and pre != kind:
        raise ValueError(f"its pre-tokenizer is {pre!r}; transformers reads any tokenizer of a qwen2 as Qwen2's own")
    sizes = read_sizes(kind, metadata)
    # The file stores single precision: 1e-5 would be read as 9.999999747378752e-06.
    theta = as_written(sizes.pop("rope_theta", 10000.0))
    epsilon = as_written(sizes.pop("rms_norm_eps"))
    heads = sizes["num_attention_heads"]
    defaults = {"num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads}
    config = AutoConfig.for_model(
        kind,
        **(defaults | sizes),
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
    if ROPE_DIVISORS in names:
        set_llama3_rope(config, load_gguf_state_dict(header)[ROPE_DIVISORS][...].float())
    return config


def read_sizes(kind: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a decoder of this architecture, by transformers' names for them.

    Raises:
        ValueError: If a setting is unknown, missing, contradicts another one, or no model can have it.
    """
    # transformers' names of the settings, by llama.cpp's names. Three of llama.cpp's settings are `head_dim`: they have
    # to agree.
    fields = {**GGUF_CONFIG_MAPPING["llama"], "attention.key_length": "head_dim", "attention.value_length": "head_dim"}
    prefix = f"{kind}."
    settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if settings.get("rope.scaling.type") == "none":
        del settings["rope.scaling.type"]
    unknown = sorted(settings.keys() - fields.keys())
    if unknown:
        raise ValueError(f"it has settings that are not known here ({', '.join(unknown[:3])})")
    sizes: dict[str, Any] = {"vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    for name, value in settings.items():
        field = fields[name]
        if fault := validate_setting(field, value):
            raise ValueError(f"its {kind}.{name} is {value}, but must be {fault}")
        if sizes.setdefault(field, value) != value:
            raise ValueError(f"its {kind}.{name} is {value}, which contradicts its other sizes")
    for name in REQUIRED:
        if name not in settings:
            raise ValueError(f"it lacks the setting {kind}.{name}")
    if sizes["num_hidden_layers"] > MAX_LAYERS:
        raise ValueError(f"it asks for {sizes['num_hidden_layers']} layers")
    return sizes


def as_written(value: float) -> float:
    """Return the shortest number that single precision rounds to `value`: 1e-5 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def set_llama3_rope(config: Any, divisors: torch.Tensor) -> None:
    """Give a configuration the rotary embedding of Llama 3.1 and later.

    The file only has the divisors of its frequencies, of shape (head size / 2,). All releases of Llama 3 share the
    other settings.

    Raises:
        ValueError: If these settings give other divisors.
    """
    theta = config.rope_parameters["rope_theta"]
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


def validate_setting(field: str, value: Any) -> str | None:
    """Return what a field of a configuration must be, as the end of "must be ...", or None if its value is valid."""
    if field not in ("rope_theta", "rms_norm_eps"):
        is_size = type(value) is int and value > 0
        return None if is_size else "a positive whole number"
    if type(value) not in (int, float) or not np.isfinite(np.float32(value)):
        return "a finite number"
    # Below 1, the rotary frequencies would grow from one dimension to the next instead of falling.
    if field == "rope_theta" and value < 1:
        return "at least 1"
    # With an epsilon of 0, normalising a row of zeros would give NaN.
    if value <= 0:
        return "positive"
    return None


def transformers_name(name: str) -> str:
    """Return transformers' name of a tensor: `blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`."""
    return ".".join(WEIGHTS.get(part, part) for part in name.split("."))


def read_weights(header: GgufHeader, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights in a GGUF file in float32, under the names of a model on the meta device.

    Raises:
        ValueError: If their names or shapes are not those of the model.
    """
    config = model.config
    tensors = [tensor for tensor in header.tensors if tensor.name != ROPE_DIVISORS]
    # llama.cpp's name -> transformers' name.
    names = {tensor.name: transformers_name(tensor.name) for tensor in tensors}
    stored_shapes = {names[tensor.name]: list(tensor.shape) for tensor in tensors}
    expected_shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected_shapes["lm_head.weight"]
    for name in sorted({*stored_shapes, *expected_shapes}):
        stored_shape = stored_shapes.get(name)
        expected_shape = expected_shapes.get(name)
        if stored_shape != expected_shape:
            in_file = "is missing" if stored_shape is None else f"has the shape {stored_shape}"
            in_model = "has none" if expected_shape is None else f"is {expected_shape}"
            raise ValueError(f"its {name} {in_file}, and a {config.model_type} of its sizes {in_model}")
    content = load_gguf_state_dict(header)
    weights = {}
    for gguf_name, name in names.items():
        values = content[gguf_name][...]
        kind = content[gguf_name].ggml_type
        values = dequantize(values, kind) if kind in GGML_BLOCK else values.float()
        shape = expected_shapes[name]
        # llama.cpp rotates neighbouring rows of a head, and transformers a row of each half. So the file of a Llama has
        # the rows in another order:
        #
        #   transformers   0 1 2 | 3 4 5
        #   file           0 3 | 1 4 | 2 5
        if config.model_type == "llama" and (".attn_q." in gguf_name or ".attn_k." in gguf_name):
            values = values.reshape(-1, config.head_dim // 2, 2, *shape[1:]).transpose(1, 2)
        weights[name] = values.reshape(shape)
    return weights
