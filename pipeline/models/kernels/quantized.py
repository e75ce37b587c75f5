"""QLoRA: LoRA adapters on a base model whose linear layers have 4 bits (https://arxiv.org/abs/2305.14314).

bitsandbytes stores each linear layer of the base model in blocks of 64 weights with 4 bits each, and computes with them
in 16 or 32 bits. They stay frozen; the adapters are trained in float32.

    trained by                   what is in 4 bits                     what the adapter belongs to afterwards
    a model                      the model                             the model itself, in the dtype of its files
    an adapter of a model        the model with the adapter merged     `base/` next to the new adapter, in 16 or 32 bits
"""

import dataclasses
import logging

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments
from trl import ModelConfig, get_quantization_config

logger = logging.getLogger(__name__)


def quantization_config(model_args: ModelConfig, training_args: TrainingArguments) -> BitsAndBytesConfig | None:
    """Return how a trainer of TRL has to quantise the model that it loads, or None without `load_in_4bit`.

    Layers compute in the precision of training. TRL would take `dtype`, the dtype of the other weights, which may be
    "auto".
    """
    if not model_args.load_in_4bit:
        return None
    dtype = "float32"
    if training_args.bf16:
        dtype = "bfloat16"
    elif training_args.fp16:
        dtype = "float16"
    kind = model_args.bnb_4bit_quant_type
    logger.info("%-11s 4 bits (%s), computing in %s, the precision of training", "weights", kind, dtype)
    return get_quantization_config(dataclasses.replace(model_args, dtype=dtype))


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that have 4 bits, by name."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def prepare_for_training(model: nn.Module) -> None:
    """Let gradients pass through the layers with 4 bits, and train adapters in float32.

    On processors with AVX512-BF16, bitsandbytes repacks a layer that runs in `eval()` mode for faster inference. From
    then on, its backward pass reads the packed weights as if they were not, and all gradients below it are wrong.

    TRL rounds the adapters on quantised models to bfloat16. With 8 bits, an update of less than 0.4% is lost.
    """
    layers = quantized_layers(model)
    if not layers:
        return
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def share_quantized_layers(source: PreTrainedModel, model: PreTrainedModel) -> None:
    """Use the layers of `source` that have 4 bits in another model too, whose modules have the same names.

    Both are then quantised models for PEFT and transformers, and have these layers in memory once.
    """
    layers = quantized_layers(source)
    if not layers:
        return
    for name, layer in layers.items():
        # A layer under an adapter is the base of the adapter: q_proj.base_layer -> q_proj.
        model.set_submodule(name.removesuffix(".base_layer"), layer)
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        setattr(model, name, getattr(source, name))
