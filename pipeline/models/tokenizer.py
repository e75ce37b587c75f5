"""Train a tokenizer on the pretraining documents, and save it as an ordinary fast tokenizer.

It works on bytes, so that any Unicode string round-trips; splits numbers into digits, so that arithmetic can be
learned; and reserves the chat tokens before any training, so that no later stage changes the vocabulary.
"""

import logging
import pickle
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from typing import Any, Literal, TypeAlias

from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.errors import LIBRARY_ERRORS, Problem, UserError
from pipeline.files.bounded import TOO_LONG, exceeded_limit

logger = logging.getLogger(__name__)

Algorithm: TypeAlias = Literal["bpe", "character"]
"""What a tokenizer learns: "bpe" merges bytes into frequent pieces of words, "character" into characters."""
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
    algorithm: Algorithm = field(
        default="bpe", metadata={"help": "bpe merges bytes into frequent pieces of words, character into characters."}
    )
    model_max_length: int = field(default=512, metadata={"help": "Context length of the model to train, in tokens."})
    tools: bool = field(default=False, metadata={"help": "Reserve tokens for calls of tools and what they return."})


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    algorithm: Algorithm = "bpe",
    model_max_length: int = 512,
    tools: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; over bytes as in GPT-2) with a chat template.

    The texts are read once. The same texts in the same order give the same tokenizer.

    Args:
        texts: Documents to learn merges from.
        vocab_size: Maximum number of tokens, including special tokens and 256 bytes. Few or short texts give fewer.
        algorithm: See `Algorithm`.
        model_max_length: Context length of the model to train, in tokens.
        tools: Whether to reserve `TOOL_TOKENS`, and to parse calls of tools.

    Returns:
        The tokenizer, with distinct pad, bos and eos tokens. It pads on the left.

    Raises:
        UserError: If `vocab_size` is too small for the bytes and the special tokens.
    """
    special: tuple[str, ...] = SPECIAL_TOKENS
    response_template: dict[str, Any] | None = None
    if tools:
        special = (*SPECIAL_TOKENS, *TOOL_TOKENS)
        response_template = RESPONSE_TEMPLATE
    if vocab_size < 256 + len(special):
        remedy = f"must be at least {256 + len(special)}: 256 bytes and the special tokens"
        raise UserError(Problem("vocab_size", vocab_size, remedy))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(algorithm)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[token for token in special if token not in (PAD, BOS, END)],
        chat_template=files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8"),
        response_template=response_template,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def pre_tokenizer(algorithm: Algorithm) -> PreTokenizer:
    """Return the pre-tokenizer, which splits a text before merges: SmolLM's, or one that splits it into characters."""
    if algorithm == "character":
        split = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # GPT-2's pattern, which ByteLevel applies, keeps merges within words.
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), to_bytes])


def separate_pad_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give a tokenizer a pad token that is not its eos token: a model would take the end of an answer for padding.

    A tokenizer with another pad token does not change. The new pad token is a special token that the chat template does
    not use. If there is none, the tokenizer pads with eos after all: the trainers here know the lengths of rows.

    Args:
        tokenizer: Changed in place.
        name: Its name, for the log.
    """
    eos = tokenizer.eos_token
    pad = tokenizer.pad_token
    if eos is None or pad not in (None, eos):
        return
    # A text with all special tokens that already have a meaning.
    used = f"{eos} {tokenizer.bos_token} {tokenizer.chat_template}"
    turns = [{"role": role, "content": "Hello"} for role in ("user", "assistant")]
    # A template that does not work is reported by `loading.validate_chat`.
    with suppress(TemplateError, *LIBRARY_ERRORS):
        used += tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [token for token in special if token not in used]
    # Prefer a token whose name says that it pads, then the unknown token (False is sorted before True).
    free.sort(key=lambda token: ("pad" not in token.lower(), token != tokenizer.unk_token))
    tokenizer.pad_token = free[0] if free else eos
    reason = "it has no pad token" if pad is None else f"{pad} also ends answers"
    logger.warning("%s: the tokenizer pads with %s, because %s.", name, tokenizer.pad_token, reason)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that matches what a tokenizer encodes as special tokens, anywhere in a text."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = [token.content for token in added if token.special and token.content.strip()]
    if not tokens:
        # This never matches.
        return re.compile("(?!)")
    # Longer tokens come first, because one may begin with another.
    tokens.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)))


def escape_tokens(messages: Iterable[Mapping[str, Any]], tokens: re.Pattern[str]) -> list[dict[str, Any]]:
    """Insert a space into each special token in messages, so that only the chat template writes any.

    "<|end|>" becomes "< |end|>". In the text of a conversation, the tokenizer cannot distinguish them from the
    template's own. `apply_chat_template(sanitize_control_tokens=True)` fails for tokenizers that also have them as
    words.

    Args:
        messages: Messages with a content, the name of a tool, or `tool_calls`, whose names and arguments are texts.
        tokens: From `special_tokens`.

    Returns:
        Copies of the messages.
    """

    def insert_space(match: re.Match[str]) -> str:
        token = match.group()
        return f"{token[0]} {token[1:]}"

    def break_tokens(value: Any) -> Any:
        """Return a copy of a JSON value with spaces in the special tokens of all of its texts."""
        if isinstance(value, str):
            return tokens.sub(insert_space, value)
        if isinstance(value, Mapping):
            return {break_tokens(key): break_tokens(item) for key, item in value.items()}
        if isinstance(value, list):
            return [break_tokens(item) for item in value]
        return value

    copies = []
    for message in messages:
        copy = dict(message)
        for key in ("content", "name", "tool_calls"):
            if key in copy:
                copy[key] = break_tokens(copy[key])
        copies.append(copy)
    return copies


_verdicts: dict[bytes, str | None] = {}
"""What `validate_tokenizer` returned, by the pickled settings of the tokenizer."""


def validate_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Try a tokenizer and its chat template on a few words, within the limits of `files.bounded`.

    Both come with downloaded models, and may double their text sixty times or never end. Return a message that says
    which of them exceeds which limit, or None if none does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    # Tokenizers with the same settings share a verdict. The vocabulary, which may be large, does not matter.
    key = pickle.dumps((str(tokenizer.chat_template), parts))
    if key not in _verdicts:
        _verdicts[key] = _try_tokenizer(tokenizer)
    return _verdicts[key]


def _try_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Tokenize two words and render the chat template in child processes; returns as `validate_tokenizer` does."""
    if fault := exceeded_limit(lambda: tokenizer.decode(tokenizer("Hello world").input_ids)):
        return f"tokenizing a word {fault}"
    if tokenizer.chat_template and (fault := exceeded_limit(lambda: _render(tokenizer))):
        return f"rendering its chat template {fault}"
    return None


def _render(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Render the chat template for several conversations, some of which it may reject.

    Return `TOO_LONG` if a few words become a long text, else None.
    """
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "Hello"}
    answer = {"role": "assistant", "content": "Hello, how may I help you?"}
    long_question = {"role": "user", "content": "Hello " * 100}
    conversations = (
        [question],
        [question, answer],
        [question, answer, long_question],
        [system, question, answer, long_question],
    )
    for conversation, add_prompt in product(conversations, (False, True)):
        try:
            text = tokenizer.apply_chat_template(conversation, add_generation_prompt=add_prompt, tokenize=False)
            # The caller will tokenize such a text without limits.
            if len(text) > 1 << 20:
                return TOO_LONG
            tokenizer(text, add_special_tokens=False)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - templates raise anything
            continue
    return None
