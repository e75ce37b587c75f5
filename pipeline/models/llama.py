"""The Llama that is trained from scratch: its sizes, and its random weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass
class LlamaArguments:
    """Sizes of a dense Llama (Touvron et al. 2023); names and meaning are those of `transformers.LlamaConfig`.

    Args:
        hidden_size (`int`, defaults to 256): width of the residual stream.
        intermediate_size (`int`, *optional*): width of the SwiGLU layer; 8/3 of `hidden_size`, rounded up to a multiple
            of 64, if not given.
        num_hidden_layers (`int`, defaults to 4): transformer blocks.
        num_attention_heads (`int`, defaults to 4): query heads.
        num_key_value_heads (`int`, *optional*): key and value heads (GQA; Ainslie et al. 2023); as many as query heads
            if not given.
        max_position_embeddings (`int`, defaults to 512): tokens that the model can see.
        rope_theta (`float`, defaults to 10000.0): base of the rotary embedding (Su et al. 2021).
        attention_bias (`bool`, defaults to `False`): biases of the attention projections, with which a head can look at
            a position whatever stands there (as in Qwen2); small models learn to copy earlier with them.
        tie_word_embeddings (`bool`, defaults to `True`): one matrix for reading and predicting tokens.
        initializer_range (`float`, defaults to 0.02): standard deviation of the random weights.
    """

    hidden_size: int = field(default=256, metadata={"help": "Width of the residual stream."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the SwiGLU layer; 8/3 of hidden_size if not given."}
    )
    num_hidden_layers: int = field(default=4, metadata={"help": "Transformer blocks."})
    num_attention_heads: int = field(default=4, metadata={"help": "Query heads."})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key and value heads (GQA); as many as query heads if not given."}
    )
    max_position_embeddings: int = field(default=512, metadata={"help": "Tokens that the model can see."})
    rope_theta: float = field(default=10_000.0, metadata={"help": "Base of the rotary embedding."})
    attention_bias: bool = field(default=False, metadata={"help": "Biases of the attention projections."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "One matrix for reading and predicting tokens."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the random weights."})


def check(args: LlamaArguments) -> list[Problem]:
    """What is wrong with the sizes, for one message that tells it all."""
    heads = args.num_attention_heads
    sizes = {
        "hidden_size": args.hidden_size,
        "intermediate_size": 1 if args.intermediate_size is None else args.intermediate_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": args.max_position_embeddings,
    }
    problems = [Problem(name, size, "a positive whole number") for name, size in sizes.items() if size < 1]
    if args.rope_theta <= 0:
        problems.append(Problem("rope_theta", args.rope_theta, "a positive number"))
    if not 0 <= args.initializer_range <= 1:
        problems.append(Problem("initializer_range", args.initializer_range, "a number from 0 to 1"))
    if heads > 0 and args.hidden_size % (2 * heads):
        problems.append(
            Problem("hidden_size", args.hidden_size, f"a multiple of 2 x num_attention_heads ({2 * heads})")
        )
    if args.num_key_value_heads is not None and (
        args.num_key_value_heads < 1 or (heads > 0 and heads % args.num_key_value_heads)
    ):
        problems.append(
            Problem("num_key_value_heads", args.num_key_value_heads, f"a divisor of num_attention_heads ({heads})")
        )
    return problems


def build_model(args: LlamaArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights in float32, for the vocabulary of `tokenizer`.

    Args:
        args (`LlamaArguments`): sizes.
        tokenizer (`PreTrainedTokenizerBase`): gives `vocab_size` and the ids of pad, bos and eos, which are set in the
            configuration and in the generation configuration.
        seed (`int`): the same seed gives the same weights; the global random state is left alone.

    Raises:
        UserError: if sizes don't fit together.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    if problems := check(args):
        raise UserError(*problems)
    special_ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size or 64 * -(-args.hidden_size * 8 // (3 * 64)),
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
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special_ids)
    return model


def log_model(model: PreTrainedModel) -> None:
    """Logs size, cost of a token and dtype: what the user did not choose, and what it follows from."""
    parameters = model.num_parameters()
    embedding = model.get_input_embeddings().weight.numel()
    tied = getattr(model.config, "tie_word_embeddings", False)
    # Each weight that multiplies an activation costs 2 FLOPs forward and 4 backward; looking a token up costs none.
    multiplied = parameters - (0 if tied else embedding)
    logger.info(
        "%-11s %s, %.2fM parameters (%.2fM of them embeddings%s), %.1f MFLOPs a token in training besides attention, "
        "weights in %s",
        "model",
        type(model).__name__,
        parameters / 1e6,
        embedding / 1e6,
        ", tied" if tied else "",
        6 * multiplied / 1e6,
        str(model.dtype).removeprefix("torch."),
    )
