"""Llama 4 (Meta 2025), a mixture of experts, beside the dense Llama: its sizes and its random weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import Problem, UserError
from pipeline.models import llama
from pipeline.models.llama import LlamaArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass
class ScratchArguments(LlamaArguments):
    """A model to train from scratch: a dense Llama, or a Llama 4 with the names of `transformers.Llama4TextConfig`.

    A layer of experts has, besides those that the router chooses among, one shared expert that takes every token, so
    that each token passes `num_experts_per_tok` + 1 experts of width `intermediate_size`. transformers computes all
    experts for all tokens, and adds what the router did not choose with weight 0: few experts are fast.

    Raises:
        UserError: If the sizes are out of range or do not fit together, or are those of the other kind of model.
    """

    model_type: Literal["llama", "llama4_text"] = field(
        default="llama", metadata={"help": "llama is dense, llama4_text a mixture of experts."}
    )
    intermediate_size_mlp: int | None = field(
        default=None,
        metadata={"help": "Llama 4: width of the layers without experts (default: the experts that a token passes)."},
    )
    num_local_experts: int | None = field(default=None, metadata={"help": "Llama 4: experts of a layer (default: 4)."})
    num_experts_per_tok: int | None = field(
        default=None, metadata={"help": "Llama 4: experts that the router chooses for a token (default: 1)."}
    )
    interleave_moe_layer_step: int | None = field(
        default=None, metadata={"help": "Llama 4: every n-th layer has experts (default: 1, each)."}
    )
    no_rope_layer_interval: int | None = field(
        default=None, metadata={"help": "Llama 4: every n-th layer has no rotary embedding (default: 4)."}
    )
    attention_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Llama 4: tokens of a chunk, within which layers with rotary embedding attend."},
    )
    use_qk_norm: bool | None = field(
        default=None, metadata={"help": "Llama 4: normalise queries and keys (default: true)."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Llama 4: weight of the loss that balances the experts in pretraining (default: 0.01)."},
    )
    router_z_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Llama 4: weight of the z-loss, which keeps router logits small (default: 0.001)."},
    )

    def __post_init__(self) -> None:
        problems = llama.check_sizes(self)
        if self.model_type == "llama":
            given = {name: value for name in LLAMA4 if (value := getattr(self, name)) is not None}
            problems += [Problem(name, value, "needs model_type: llama4_text") for name, value in given.items()]
        else:
            problems += _check_experts(self)
        if problems:
            raise UserError(*problems)
        if self.model_type == "llama4_text":
            for name, value in LLAMA4.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)


LLAMA4: dict[str, Any] = {
    "intermediate_size_mlp": None,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": None,
    "use_qk_norm": True,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001,
}
"""The fields that only a Llama 4 has, and their defaults."""


def _check_experts(args: ScratchArguments) -> list[Problem]:
    """Check the fields of a Llama 4, given or not."""
    values = {name: default if (given := getattr(args, name)) is None else given for name, default in LLAMA4.items()}
    problems = [
        Problem(name, value, "must be a positive whole number")
        for name, value in values.items()
        if value is not None and not name.startswith(("router", "use")) and value < 1
    ]
    problems += [
        Problem(name, value, "must not be negative")
        for name, value in values.items()
        if name.startswith("router") and value < 0
    ]
    if not problems:
        experts, chosen, step = (values[name] for name in list(LLAMA4)[1:4])
        if chosen > experts:
            problems.append(Problem("num_experts_per_tok", chosen, f"there are {experts} experts; lower it"))
        if step > args.num_hidden_layers:
            remedy = f"no layer would have experts: there are {args.num_hidden_layers} layers; lower it"
            problems.append(Problem("interleave_moe_layer_step", step, remedy))
    return problems


def build_model(args: ScratchArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build the model with random weights in float32; the arguments are those of `pipeline.models.llama.build_model`.

    The configuration of a Llama 4 has no `router_aux_loss_coef`, because TRL takes any other than 0 for a loss that the
    model returns, which it does not. `pipeline.training.pretraining` computes it.
    """
    if args.model_type == "llama":
        return llama.build_model(args, tokenizer, seed)
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    same = (
        "num_local_experts", "num_experts_per_tok", "interleave_moe_layer_step", "no_rope_layer_interval",
        "attention_chunk_size", "use_qk_norm",
    )  # fmt: skip
    width = args.intermediate_size or llama.default_width(args.hidden_size)
    return llama.random_model(
        Llama4ForCausalLM,
        Llama4TextConfig,
        args,
        tokenizer,
        seed,
        intermediate_size=width,
        intermediate_size_mlp=args.intermediate_size_mlp or width * (1 + (args.num_experts_per_tok or 1)),
        head_dim=args.hidden_size // args.num_attention_heads,
        # The scale of queries by their place in the row, which begins at 8,192 tokens, ignores `position_ids`: packed
        # documents would get each other's.
        attn_temperature_tuning=False,
        router_aux_loss_coef=0.0,
        **{name: getattr(args, name) for name in same},
    )


class Vocabulary(list[int]):
    """As much of a tokenizer as a model is built with."""

    pad_token_id = bos_token_id = eos_token_id = None


def build_empty(args: ScratchArguments, size: int) -> PreTrainedModel:
    """Build the model for a vocabulary of `size` tokens on the meta device, where it takes no memory."""
    import torch

    tokenizer: Any = Vocabulary(range(size))
    with torch.device("meta"):
        return build_model(args, tokenizer, 0)


def log_model(model: PreTrainedModel) -> None:
    """Log what follows from the sizes: the numbers of parameters and of FLOPs per token, and the dtype."""
    from pipeline.models.experts import active_parameters

    parameters, active = model.num_parameters(), active_parameters(model)
    embedding = model.get_input_embeddings().weight.numel()
    tied = getattr(model.config, "tie_word_embeddings", False)
    # Each weight that multiplies an activation costs 2 FLOPs forward and 4 backward; an embedding lookup costs none.
    multiplied = active - (0 if tied else embedding)
    logger.info(
        "%-11s %s, %.2fM parameters (%s%.2fM of them embeddings%s), %.1f MFLOPs per token in training without "
        "attention, weights in %s",
        "model",
        type(model).__name__,
        parameters / 1e6,
        f"{active / 1e6:.2f}M of them active for a token, " if active != parameters else "",
        embedding / 1e6,
        ", tied" if tied else "",
        6 * multiplied / 1e6,
        str(model.dtype).removeprefix("torch."),
    )
