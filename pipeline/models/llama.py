"""The Llama that is trained from scratch: its sizes and its random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass
class LlamaArguments:
    """Sizes of a dense Llama (Touvron et al. 2023), with the names and meanings of `transformers.LlamaConfig`.

    It has rotary embeddings (Su et al. 2021) and, with fewer key and value heads than query heads, grouped-query
    attention (Ainslie et al. 2023).

    Raises:
        UserError: If the sizes are out of range or do not fit together.
    """

    hidden_size: int = field(default=256, metadata={"help": "Width of the residual stream."})
    intermediate_size: int | None = field(
        default=None,
        metadata={"help": "Width of the SwiGLU layer (default: 8/3 of hidden_size, rounded up to a multiple of 64)."},
    )
    num_hidden_layers: int = field(default=4, metadata={"help": "Transformer blocks."})
    num_attention_heads: int = field(default=4, metadata={"help": "Query heads."})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key and value heads (default: as many as query heads)."}
    )
    max_position_embeddings: int = field(default=512, metadata={"help": "Maximum context length, in tokens."})
    rope_theta: float = field(default=10_000.0, metadata={"help": "Base of the rotary embedding."})
    attention_bias: bool = field(
        default=False,
        metadata={"help": "Add biases to the attention projections, as in Qwen2: small models learn to copy earlier."},
    )
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Share the input and output embeddings."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the random weights."})

    def __post_init__(self) -> None:
        if problems := check_sizes(self):
            raise UserError(*problems)


def check_sizes(args: LlamaArguments) -> list[Problem]:
    """Check that the sizes are in range and fit together."""
    heads, groups = args.num_attention_heads, args.num_key_value_heads
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    problems = [
        Problem(name, size, "must be a positive whole number")
        for name in names
        if (size := getattr(args, name)) is not None and size < 1
    ]
    if args.rope_theta <= 0:
        problems.append(Problem("rope_theta", args.rope_theta, "must be positive"))
    if not 0 <= args.initializer_range <= 1:
        problems.append(Problem("initializer_range", args.initializer_range, "must be from 0 to 1"))
    if heads > 0 and args.hidden_size % (2 * heads):
        remedy = f"must be a multiple of 2 x num_attention_heads ({2 * heads})"
        problems.append(Problem("hidden_size", args.hidden_size, remedy))
    if groups is not None and (groups < 1 or (heads > 0 and heads % groups)):
        problems.append(Problem("num_key_value_heads", groups, f"must be a divisor of num_attention_heads ({heads})"))
    return problems


def default_width(hidden_size: int) -> int:
    """Return 8/3 of `hidden_size`, rounded up to a multiple of 64."""
    return 64 * -(-hidden_size * 8 // (3 * 64))


def build_model(args: LlamaArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """Build a Llama with random weights in float32.

    Args:
        args: Its sizes.
        tokenizer: Its tokenizer, which sets the vocabulary size and the ids of pad, bos and eos in the configuration
            and in the generation configuration.
        seed: The same seed gives the same weights; the global random state does not change.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    width = args.intermediate_size or default_width(args.hidden_size)
    return random_model(LlamaForCausalLM, LlamaConfig, args, tokenizer, seed, intermediate_size=width)


def random_model(
    model_class: Any, config_class: Any, args: LlamaArguments, tokenizer: PreTrainedTokenizerBase, seed: int, **own: Any
) -> Any:
    """Build a model of a class of transformers; `own` are fields of its configuration besides those of any Llama."""
    import torch
    from transformers import GenerationConfig

    from pipeline import hardware

    special_ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads or args.num_attention_heads,
        max_position_embeddings=args.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        attention_bias=args.attention_bias,
        tie_word_embeddings=args.tie_word_embeddings,
        initializer_range=args.initializer_range,
        dtype=torch.float32,
        **special_ids,
        **own,
    )
    with hardware.unchanged_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config = GenerationConfig(**special_ids)
    return model
