"""A policy that calls tools: a chain of words with given probabilities, and a tokenizer of whole words.

<|assistant|> -> <|call|> (0.6), yes, no        <|call|> -> double (0.9), nothing
double -> <|argument|> -> n=1 (0.5), n=2 (0.4), n=x        n=1, n=2, n=x, yes, no, nothing -> <|end|>
"""

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.models.tokenizer import RESPONSE_TEMPLATE, SPECIAL_TOKENS, TOOL_TOKENS
from tests.helpers.small_model import tokenizer as small_tokenizer

WORDS = ["double", "nothing", "n=1", "n=2", "n=x", "1", "2", "4", "x", "yes", "no", "error"]
VOCABULARY = [*SPECIAL_TOKENS, *TOOL_TOKENS, *WORDS]
CHAIN: dict[str, dict[str, float]] = {
    "<|assistant|>": {"<|call|>": 0.6, "yes": 0.2, "no": 0.2},
    "<|call|>": {"double": 0.9, "nothing": 0.1},
    "double": {"<|argument|>": 1.0},
    "<|argument|>": {"n=1": 0.5, "n=2": 0.4, "n=x": 0.1},
    **{word: {"<|end|>": 1.0} for word in ("n=1", "n=2", "n=x", "yes", "no", "nothing")},
}


def double(n: int) -> int:
    """Double a number.

    Args:
        n: The number.
    """
    return 2 * int(n)


class Counter:
    """An environment that counts how often it was asked, up to a limit that comes from the data."""

    def reset(self, most: int = 2, **_: Any) -> str:
        """Begin anew."""
        self._most, self._asked = most, 0
        return " yes"

    def double(self, n: int) -> str:
        """Double a number.

        Args:
            n: The number.
        """
        self._asked += 1
        if self._asked > self._most:
            raise ValueError("no")
        return str(2 * int(n))

    def get_reward(self) -> float:
        """Return how often it was asked."""
        return float(self._asked)


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="error"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=VOCABULARY[3 : len(SPECIAL_TOKENS) + len(TOOL_TOKENS)],
        chat_template=small_tokenizer().chat_template,
        response_template=RESPONSE_TEMPLATE,
        padding_side="left",
    )


def policy(calls: float = 0.6) -> LlamaForCausalLM:
    """Return the policy; `calls` is the probability of a call, where a turn begins."""
    size = len(VOCABULARY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    chain = CHAIN | {"<|assistant|>": {"<|call|>": calls, "yes": (1 - calls) / 2, "no": (1 - calls) / 2}}
    # Without layers, what is left is the embedding of the last word, scaled to a root mean square of 1.
    table = torch.full((size, size), -30.0)
    for word, next_words in chain.items():
        for next_word, probability in next_words.items():
            table[VOCABULARY.index(next_word), VOCABULARY.index(word)] = torch.tensor(max(probability, 1e-9)).log()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = table / config.hidden_size**0.5
    return model


def prompts(rows: int = 16) -> Dataset:
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": ["1", "2", "x"][i % 3]}], "most": 1 + i % 2} for i in range(rows)]
    )


def results(completions: list[Any], **_: Any) -> list[float]:
    """Reward: how often a tool answered."""
    return [float(sum(message["role"] == "tool" for message in completion)) for completion in completions]


def says_yes(completions: list[Any], **_: Any) -> list[float]:
    """Reward: 1 for a last message that says yes, and a tenth for each result of a tool."""
    return [
        float(completion[-1]["content"] == "yes") + number / 10
        for completion, number in zip(completions, results(completions), strict=True)
    ]
