"""The tokenizer: no text is lost, prompts are prefixes of conversations, the mask covers what is learned."""

from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response, supports_tool_calling

from pipeline.data.arguments import DataArguments
from pipeline.errors import UserError
from pipeline.models.tokenizer import (
    SPECIAL_TOKENS,
    Algorithm,
    TokenizerArguments,
    escape_tokens,
    special_tokens,
    train_tokenizer,
)
from recipes.tokenizer import main
from tests.helpers.files import write_rows

TEXTS = [
    "The cat sat on the mat, and the dog didn't. 12 + 34 = 46.\n\tWho's there? It's 2026!",
    "def add(x):\n    return x + 1\n\n# naïve café: 日本語, emoji 🦊🏳️‍🌈, Ελληνικά",
] * 50
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
EXAMPLES = settings(max_examples=60, deadline=None)
CONTENTS = st.one_of(st.text(), st.sampled_from(["", " ", "\n", " a ", "é", "日本", "🦊", "12 12", "it's\r\n"]))


@cache
def tokenizer(algorithm: Algorithm = "bpe") -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, vocab_size=400, algorithm=algorithm)


def messages(contents: list[str], system: str | None = None) -> list[dict[str, str]]:
    """Return a conversation of these turns; the user begins, and the assistant alternates with them."""
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def ids(conversation: list[dict[str, str]], generation_prompt: bool = False) -> list[int]:
    return tokenizer().apply_chat_template(conversation, add_generation_prompt=generation_prompt, return_dict=False)


conversations = st.builds(
    messages,
    st.integers(1, 3).flatmap(lambda n: st.lists(CONTENTS, min_size=2 * n, max_size=2 * n)),
    st.none() | CONTENTS,
)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@EXAMPLES
@given(text=CONTENTS)
def test_any_text_round_trips(algorithm: Algorithm, text: str) -> None:
    for special in (False, True):
        encoded = tokenizer(algorithm).encode(text, add_special_tokens=special)
        assert tokenizer(algorithm).decode(encoded) == text
    assert all(0 <= token < len(tokenizer(algorithm)) for token in encoded)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@EXAMPLES
@given(number=st.integers(min_value=0), text=st.sampled_from(["", " ", "x", "é", "= "]))
def test_digits_stand_alone(algorithm: Algorithm, number: int, text: str) -> None:
    tokens = tokenizer(algorithm).tokenize(f"{text}{number}")
    assert tokens[-len(str(number)) :] == list(str(number))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_token_contains_a_digit_and_more(algorithm: Algorithm) -> None:
    assert all(len(token) == 1 for token in tokenizer(algorithm).get_vocab() if set(token) & set("0123456789"))


def test_bpe_joins_frequent_pieces_and_characters_stay_single() -> None:
    text = "The cat sat on the mat, naïve 🦊"
    assert len(tokenizer("bpe").encode(text)) < len(text)
    for token in tokenizer("character").encode(text):
        assert len(tokenizer("character").decode([token])) == 1
    assert len(tokenizer("character").encode("日本語 🦊")) == 5, "each one token"


def test_special_tokens_are_distinct_single_and_at_the_start_of_the_vocabulary() -> None:
    words = tokenizer()
    assert [words.convert_ids_to_tokens(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert len({words.pad_token_id, words.bos_token_id, words.eos_token_id}) == 3
    assert None not in (words.pad_token_id, words.bos_token_id, words.eos_token_id)
    for token in SPECIAL_TOKENS:
        assert words.encode(token, add_special_tokens=False) == [words.convert_tokens_to_ids(token)]
    assert words.decode(words.encode("<|user|>a<|end|>"), skip_special_tokens=True) == "a"
    assert max(words.get_vocab().values()) + 1 == len(words) == len(words.get_vocab())


@EXAMPLES
@given(conversations)
def test_a_prompt_is_a_prefix_of_its_conversation(conversation: list[dict[str, str]]) -> None:
    whole = ids(conversation)
    for end, message in enumerate(conversation):
        if message["role"] == "assistant":
            prompt = ids(conversation[:end], generation_prompt=True)
            assert whole[: len(prompt)] == prompt
            continued = ids(conversation[: end + 1])
            assert whole[: len(continued)] == continued, "each turn begins where the last one ended"


@EXAMPLES
@given(conversations)
def test_the_assistant_mask_covers_what_it_says_and_its_end_of_turn(
    conversation: list[dict[str, str]],
) -> None:
    words = tokenizer()
    encoded = words.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    answers, expected = [], []
    for end, message in enumerate(conversation):
        if message["role"] == "assistant":
            begin = len(ids(conversation[:end], generation_prompt=True))
            expected += range(begin, len(ids(conversation[: end + 1])))
            answers.append(message["content"] + words.eos_token)
    covered = [position for position, inside in enumerate(encoded["assistant_masks"]) if inside]
    assert covered == expected
    assert words.decode([encoded["input_ids"][position] for position in covered]) == "".join(answers)


@EXAMPLES
@given(conversations)
def test_a_conversation_reads_as_it_is_written(conversation: list[dict[str, str]]) -> None:
    written = "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in conversation)
    assert tokenizer().decode(ids(conversation)) == f"<|bos|>{written}"
    assert ids(conversation)[-1] == tokenizer().eos_token_id, "nothing follows the last end of turn"


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(TemplateError, match="not developer"):
        ids([*messages(["a", "b"]), {"role": "developer", "content": "c"}])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_auto_tokenizer_loads_what_is_saved(tmp_path: Path, algorithm: Algorithm) -> None:
    saved = tokenizer(algorithm)
    saved.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.get_vocab() == saved.get_vocab()
    assert loaded.encode(TEXTS[1]) == saved.encode(TEXTS[1]) and loaded.decode(loaded.encode(TEXTS[1])) == TEXTS[1]
    assert loaded.special_tokens_map == saved.special_tokens_map
    assert (loaded.chat_template, loaded.model_max_length) == (saved.chat_template, saved.model_max_length)
    prompt = messages(["What is a cat?"])
    assert loaded.decode(loaded.apply_chat_template(prompt, return_dict=False)) == tokenizer().decode(ids(prompt))


def test_the_vocabulary_has_the_size_asked_for() -> None:
    text = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600))
    assert len(train_tokenizer([text], vocab_size=500)) == 500
    smallest = 256 + len(SPECIAL_TOKENS)
    assert len(train_tokenizer([], vocab_size=1000)) == smallest, "without text there is nothing to merge"
    with pytest.raises(UserError, match=f"vocab_size: {smallest - 1}: must be at least {smallest}"):
        train_tokenizer([text], vocab_size=smallest - 1)


def test_the_same_texts_make_the_same_tokenizer() -> None:
    first, second = (train_tokenizer(iter(TEXTS), vocab_size=400) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_the_command_trains_on_the_training_split_and_replaces_the_folder(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    write_rows(source, [{"text": text} for text in TEXTS])
    target = tmp_path / "tokenizer"
    for vocab_size in (300, 310):
        main(TokenizerArguments(str(target), vocab_size), DataArguments(dataset_name=str(source)))
        assert len(AutoTokenizer.from_pretrained(target)) == vocab_size
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["tokenizer"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"^output_dir: .* contains other files"):
        main(TokenizerArguments(str(tmp_path)), DataArguments(dataset_name=str(tmp_path)))
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


@EXAMPLES
@given(parts=st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "<|", "|>", "end"]), min_size=1, max_size=8))
def test_only_the_chat_template_writes_special_tokens(parts: list[str]) -> None:
    plain, spelled = (messages([text, text]) for text in ("a", "".join(parts)))
    broken = escape_tokens(spelled, special_tokens(tokenizer()))
    special = set(tokenizer().all_special_ids)
    assert [i for i in ids(broken) if i in special] == [i for i in ids(plain) if i in special]
    assert [m["content"].replace(" ", "") for m in broken] == [m["content"].replace(" ", "") for m in spelled]


def test_other_texts_are_left_alone() -> None:
    conversation = messages(["<end> <|end| >", "<think>a</think>"])
    assert escape_tokens(conversation, special_tokens(tokenizer())) == conversation


def test_calls_of_tools_and_their_results_make_a_round_trip_through_the_templates(tmp_path: Path) -> None:
    def look(place: str, seconds: int = 1) -> str:
        """Look somewhere.

        Args:
            place: Where.
            seconds: For how long.
        """
        return place * seconds

    train_tokenizer(TEXTS, vocab_size=400, tools=True).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("<|call|>", add_special_tokens=False)["input_ids"]) == 1
    calls = [
        {"type": "function", "function": {"name": "look", "arguments": {"place": "a <box>\n 7 = 8", "seconds": 7}}},
        {"type": "function", "function": {"name": "look", "arguments": {"place": "7"}}},
    ]
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "I look.", "tool_calls": calls}]
    prompt, whole = (
        tokenizer.apply_chat_template(some, add_generation_prompt=some is not messages, return_dict=False)
        for some in (messages[:1], messages)
    )
    assert whole[: len(prompt)] == prompt
    assert parse_response(tokenizer, whole[len(prompt) :], prefix=prompt, tools=[look]) == messages[1]
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
