"""The model to train from scratch, with random weights: a dense Llama or Qwen3, or a Llama 4, of given sizes."""

import logging
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from pipeline import hardware
from pipeline.errors import Problem, refuse
from pipeline.models.experts import active_parameters, training_flops_per_token

logger = logging.getLogger(__name__)


@dataclass
class ScratchArguments:
    """A model to train from scratch, with the names of transformers' configurations: a dense one, or a Llama 4.

    A Llama (Touvron et al. 2023) has rotary embeddings (Su et al. 2021) and, with fewer key and value heads than query
    heads, grouped-query attention (Ainslie et al. 2023); a Qwen3 (2025) also normalises queries and keys: with an
    `embedding_mean`, small ones copy sooner. In a Llama 4 (Meta 2025), each token passes `num_experts_per_tok` experts
    (`intermediate_size` wide) and a shared one. transformers computes every expert for every token: many are slow.

    Raises:
        UserError: If the sizes do not fit together, or belong to the other kind of model.
    """

    hidden_size: int = HfArg(default=256, help="Width of the residual stream.")
    intermediate_size: int | None = HfArg(
        default=None, help="Width of the SwiGLU layer (default: 8/3 of hidden_size, rounded up to a multiple of 64)."
    )
    num_hidden_layers: int = HfArg(default=4, help="Transformer blocks.")
    num_attention_heads: int = HfArg(default=4, help="Query heads.")
    num_key_value_heads: int | None = HfArg(default=None, help="Key and value heads (default: as many as query heads).")
    max_position_embeddings: int = HfArg(default=512, help="Maximum context length, in tokens.")
    rope_theta: float = HfArg(default=10_000.0, help="Base of the rotary embedding.")
    attention_bias: bool = HfArg(default=False, help="Biases in attention, as in Qwen2, help small models copy.")
    tie_word_embeddings: bool = HfArg(default=True, help="Share the input and output embeddings.")
    initializer_range: float = HfArg(default=0.02, help="Standard deviation of the random weights.")
    embedding_mean: float = HfArg(default=0.0, help="Mean of the random embeddings: what they share acts as a bias.")
    model_type: Literal["llama", "qwen3", "llama4_text"] = HfArg(
        default="llama", help="llama and qwen3 are dense, qwen3 normalises queries and keys; llama4_text has experts."
    )
    intermediate_size_mlp: int | None = HfArg(
        default=None, help="Llama 4: width of the layers without experts (default: of all experts that a token passes)."
    )
    num_local_experts: int | None = HfArg(default=None, help="Llama 4: experts of a layer (default: 4).")
    num_experts_per_tok: int | None = HfArg(default=None, help="Llama 4: experts chosen for a token (default: 1).")
    interleave_moe_layer_step: int | None = HfArg(default=None, help="Llama 4: experts every n-th layer (default: 1).")
    no_rope_layer_interval: int | None = HfArg(default=None, help="Llama 4: no RoPE every n-th layer (default: 4).")
    attention_chunk_size: int | None = HfArg(default=None, help="Llama 4: chunk within which RoPE layers attend.")
    use_qk_norm: bool | None = HfArg(default=None, help="Llama 4: normalise queries and keys (default: true).")
    router_aux_loss_coef: float | None = HfArg(default=None, help="Llama 4: weight of balancing loss (default: 0.01).")
    router_z_loss_coef: float | None = HfArg(default=None, help="Llama 4: weight of router z-loss (default: 0.001).")

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        key_heads = self.num_key_value_heads
        # Rotary embeddings rotate pairs of a head's channels.
        factor = 2 * heads
        problems = []
        if self.hidden_size % factor != 0:
            remedy = f"must be a multiple of 2 x num_attention_heads ({factor})"
            problems.append(Problem("hidden_size", self.hidden_size, remedy))
        if key_heads is not None and heads % key_heads != 0:
            remedy = f"must be a divisor of num_attention_heads ({heads})"
            problems.append(Problem("num_key_value_heads", key_heads, remedy))
        if self.attention_bias and self.model_type == "qwen3":
            problems.append(Problem("attention_bias", True, "llama.cpp cannot open such a qwen3; leave it out"))
        problems += self._set_and_check_experts()
        refuse(*problems)

    def _set_and_check_experts(self) -> list[Problem]:
        """Set the defaults of a Llama 4 and check its experts, or report fields that only a Llama 4 has."""
        settings = {name: getattr(self, name) for name in LLAMA4 if getattr(self, name) is not None}
        if self.model_type != "llama4_text":
            return [Problem(name, value, "needs model_type: llama4_text") for name, value in settings.items()]
        settings = LLAMA4 | settings
        vars(self).update(settings)
        experts = settings["num_local_experts"]
        experts_of_token = settings["num_experts_per_tok"]
        step = settings["interleave_moe_layer_step"]
        problems = []
        if experts_of_token > experts:
            remedy = f"there are {experts} experts; lower it"
            problems.append(Problem("num_experts_per_tok", experts_of_token, remedy))
        if step > self.num_hidden_layers:
            problems.append(Problem("interleave_moe_layer_step", step, "no layer has experts; lower it"))
        return problems


LLAMA4: dict[str, Any] = {
    "intermediate_size_mlp": None, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4, "attention_chunk_size": None, "use_qk_norm": True,
    "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001,
}  # fmt: skip
"""The fields that only a Llama 4 has, and their defaults."""


def build_model(args: ScratchArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build the model with random weights in float32. The global random state does not change.

    Args:
        args: The sizes of the model.
        tokenizer: Its tokens are the vocabulary; its pad, bos and eos tokens go into the configurations.
        seed: Seed of the random weights.
    """
    config_class = transformers.CONFIG_MAPPING[args.model_type]
    config_fields = {item.name for item in fields(config_class)}
    special_ids = {name: getattr(tokenizer, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    # The three matrices of a SwiGLU layer of this width have as many weights as the two of a layer without a gate,
    # which is usually four times as wide as the hidden size.
    width = args.intermediate_size or 64 * math.ceil(args.hidden_size * 8 / (3 * 64))
    settings: dict[str, Any] = {name: value for name, value in vars(args).items() if name in config_fields}
    settings |= {
        "vocab_size": len(tokenizer),
        "intermediate_size": width,
        "num_key_value_heads": args.num_key_value_heads or args.num_attention_heads,
        "head_dim": args.hidden_size // args.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "dtype": torch.float32,
        **special_ids,
    }
    if args.model_type == "llama4_text":
        # A token passes the experts that the router chooses, and a shared one.
        experts_of_token = 1 + (args.num_experts_per_tok or 1)
        settings |= {
            "intermediate_size_mlp": args.intermediate_size_mlp or width * experts_of_token,
            # Queries are scaled by position from 8,192 tokens on, ignoring the `position_ids` of packed documents.
            "attn_temperature_tuning": False,
            # With another coefficient, TRL would expect the model to compute a loss. `training.pretraining` does that.
            "router_aux_loss_coef": 0.0,
        }
    with hardware.unchanged_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config_class(**settings))
    if args.embedding_mean:
        model.get_input_embeddings().weight.data += args.embedding_mean
    model.generation_config = GenerationConfig(**special_ids)
    return model


def build_empty(args: ScratchArguments, size: int) -> PreTrainedModel:
    """Build the model for a vocabulary of `size` tokens on the meta device, where it needs no memory."""
    # `build_model` only needs the length of a tokenizer, which a range has as well. Special tokens may be missing.
    with torch.device("meta"):
        return build_model(args, cast(Any, range(size)), seed=0)


def log_model(model: PreTrainedModel) -> None:
    """Log the numbers of parameters and of FLOPs per token, and the dtype."""
    parameters = model.num_parameters()
    active = active_parameters(model)
    embeddings = model.get_input_embeddings().weight.numel()
    counts = f"{embeddings / 1e6:.2f}M of them embeddings"
    if model.config.tie_word_embeddings:
        counts += ", tied"
    if active != parameters:
        counts = f"{active / 1e6:.2f}M of them active for a token, {counts}"
    cost = f"{training_flops_per_token(model, 0) / 1e6:.1f} MFLOPs per token in training without attention"
    what = f"{type(model).__name__}, {parameters / 1e6:.2f}M parameters ({counts})"
    logger.info("%-11s %s, %s, weights in %s", "model", what, cost, str(model.dtype).removeprefix("torch."))
