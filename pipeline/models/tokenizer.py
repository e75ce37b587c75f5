"""Train a tokenizer on the pretraining documents, and save it as an ordinary fast tokenizer.

It works on bytes, so that any Unicode string round-trips; splits numbers into digits, so that arithmetic can be
learned; and reserves the chat tokens before any training, so that no later stage changes the vocabulary.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.errors import Problem, UserError
from pipeline.files.bounded import TOO_LONG, exceeded_limit

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
"""Padding, the start of a document or conversation, and the end of a document or turn (the end-of-sequence token)."""
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, BOS, END, *ROLES)
TOOL_TOKENS = ("<|tool|>", "<|call|>", "<|argument|>")
"""The role of a tool's result, a tool call, and its argument; reserved with `tools`:

    <|assistant|><|call|>calculator<|argument|>expression=1234+5678<|end|><|tool|>6912<|end|><|assistant|>6912<|end|>
"""
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<\|call\|>(?P<name>[^<]*)",
            "close_pattern": r"(?=<\|call\|>)|<\|end\|>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<\|argument\|>(?P<key>[^=<]*)=(?P<value>.*?)(?=<\|argument\|>|$)",
                "value_parser": {"name": "text", "args": {"strip": False}},
            },
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}
"""How transformers parses what chat_template.jinja writes: the content of an answer, and its tool calls.

Only tokenizers with `tools` have it, because TRL then parses every completion, which takes longer than decoding it.
"""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""The files that any release of transformers writes in `save_pretrained`."""


@dataclass
class TokenizerArguments:
    """The tokenizer to train, and where it is saved."""

    output_dir: str = field(metadata={"help": "Folder to write, for AutoTokenizer.from_pretrained."})
    vocab_size: int = field(default=2048, metadata={"help": "Maximum size, including special tokens and 256 bytes."})
    algorithm: Literal["bpe", "character"] = field(
        default="bpe", metadata={"help": "bpe merges bytes into frequent pieces of words, character into characters."}
    )
    model_max_length: int = field(default=512, metadata={"help": "Context length of the model to train, in tokens."})
    tools: bool = field(default=False, metadata={"help": "Reserve tokens for calls of tools and what they return."})


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    algorithm: Literal["bpe", "character"] = "bpe",
    model_max_length: int = 512,
    tools: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; over bytes as in GPT-2) with a chat template.

    The texts are read once. Few or short ones give a smaller vocabulary than `vocab_size`.

    Raises:
        UserError: If `vocab_size` is too small for the bytes and the special tokens.
    """
    special = (*SPECIAL_TOKENS, *TOOL_TOKENS) if tools else SPECIAL_TOKENS
    if vocab_size < 256 + len(special):
        remedy = f"must be at least {256 + len(special)}: 256 bytes and the special tokens"
        raise UserError(Problem("vocab_size", vocab_size, remedy))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(algorithm)
    tokenizer.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), **options)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(special[len((PAD, BOS, END)) :]),
        chat_template=files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8"),
        response_template=RESPONSE_TEMPLATE if tools else None,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def pre_tokenizer(algorithm: Literal["bpe", "character"]) -> PreTokenizer:
    """Return the pre-tokenizer, which splits a text before merges: SmolLM's, or one that splits it into characters."""
    if algorithm == "character":
        split = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # GPT-2's pattern, which ByteLevel applies, keeps merges within words.
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), to_bytes])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that matches what a tokenizer encodes as special tokens, anywhere in a text."""
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
    # Longer tokens first, because one may begin with another. "(?!)" never matches.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def as_text(messages: Iterable[Mapping[str, Any]], tokens: re.Pattern[str]) -> list[dict[str, Any]]:
    """Insert spaces into special tokens in messages, so that only the chat template writes any.

    In the text of a conversation, the tokenizer cannot distinguish them from the template's own.
    `apply_chat_template(sanitize_control_tokens=True)` fails for tokenizers that also have them as words.

    Args:
        messages: Messages with a content, the name of a tool, or `tool_calls`, whose names and arguments are texts.
        tokens: From `special_tokens`.
    """

    def broken(value: Any) -> Any:
        if isinstance(value, str):
            return tokens.sub(lambda spelled: f"{spelled[0][0]} {spelled[0][1:]}", value)
        if isinstance(value, Mapping):
            return {broken(key): broken(one) for key, one in value.items()}
        return [broken(one) for one in value] if isinstance(value, list) else value

    return [{**m, **{key: broken(m[key]) for key in ("content", "name", "tool_calls") if key in m}} for m in messages]


_verdicts: dict[bytes, str | None] = {}


def validate_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Report a tokenizer or chat template that takes too long for a single word or turn, or return None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    # Tokenizers with the same settings share a verdict. The vocabulary, which may be large, does not matter.
    key = pickle.dumps((str(tokenizer.chat_template), parts))
    if key not in _verdicts:
        _verdicts[key] = None
        if fault := exceeded_limit(lambda: tokenizer.decode(tokenizer("Hello world").input_ids)):
            _verdicts[key] = f"tokenizing a word {fault}"
        elif tokenizer.chat_template and (fault := exceeded_limit(lambda: _render(tokenizer))):
            _verdicts[key] = f"rendering its chat template {fault}"
    return _verdicts[key]


def _render(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Render the chat template, which may refuse conversations. Return `TOO_LONG` if a few words become a long text."""
    contents = {"system": "Be brief.", "user": "Hello", "assistant": "Hello, how may I help you?"}
    turns = [{"role": role, "content": content} for role, content in contents.items()]
    turns.append({"role": "user", "content": "Hello " * 100})
    for conversation, prompt in product((turns[1:2], turns[1:3], turns[1:], turns), (False, True)):
        try:
            text = tokenizer.apply_chat_template(conversation, add_generation_prompt=prompt, tokenize=False)
            # The caller will tokenize such a text without limits.
            if len(text) > 1 << 20:
                return TOO_LONG
            tokenizer(text, add_special_tokens=False)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - templates raise anything
            continue
    return None
