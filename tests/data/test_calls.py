"""Conversations in which the assistant calls tools, from any form and file, up to the labels that are learned from."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import ModelConfig, SFTConfig

from pipeline.data.arguments import DataArguments
from pipeline.data.messages import ShapeError, is_informative, read_messages, read_pair, refuse_special_tokens
from pipeline.data.splits import has_calls, load_splits
from pipeline.data.writing import CALLING, MESSAGES
from pipeline.errors import UserError
from pipeline.models.tokenizer import escape_tokens, special_tokens
from pipeline.training.inputs import load_inputs
from tests.helpers.files import write_rows
from tests.helpers.small_model import CHATML, conversation, save_model, tokenizer

LOOK = {"name": "look", "arguments": {"place": "a box", "seconds": 7}}
WAIT = {"name": "wait", "arguments": {}}
HUMAN = {"from": "human", "value": "Where is it?"}
SEEN = {"from": "observation", "value": '{"seen": 0}'}
GPT = {"from": "gpt", "value": "Nowhere."}
USER, RESULT, ANSWER = (
    {"role": role, "content": one["value"]} for role, one in {"user": HUMAN, "tool": SEEN, "assistant": GPT}.items()
)


def calling(*functions: dict[str, Any], content: str = "") -> dict[str, Any]:
    calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def as_json(function: dict[str, Any]) -> dict[str, Any]:
    """Return a function with its arguments as OpenAI's API returns them."""
    return {**function, "arguments": json.dumps(function["arguments"])}


def called(value: object) -> dict[str, object]:
    return {"from": "function_call", "value": value if isinstance(value, str) else json.dumps(value)}


def load(*paths: str, streaming: bool = False, **options: Any) -> Any:
    args = DataArguments([*paths], dataset_streaming=streaming, validation_share=0.0, **options)
    return load_splits(args, "conversation", evaluation=False)[0]


EMPTY = {"role": "assistant", "content": None}
WHOLE = [USER, calling(LOOK), RESULT, ANSWER]
SHAPES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "OpenAI's": (
        [USER, {**calling(as_json(LOOK)), "content": None}, {**RESULT, "tool_call_id": "1", "name": "look"}, ANSWER],
        WHOLE,
    ),
    "OpenAI's without a content": ([USER, {"role": "assistant", "tool_calls": [{"function": LOOK}]}], WHOLE[:2]),
    "OpenAI's first": (
        [USER, {**EMPTY, "function_call": as_json(LOOK)}, {**RESULT, "role": "function"}, ANSWER],
        WHOLE,
    ),
    "calls as text": (
        [
            {**USER, "tool_calls": "[]"},
            {"role": "assistant", "content": "", "tool_calls": json.dumps([{"function": as_json(LOOK)}])},
            ANSWER | {"role": "tool"},
            ANSWER | {"tool_calls": "null"},
        ],
        [*WHOLE[:2], ANSWER | {"role": "tool"}, ANSWER],
    ),
    "ShareGPT's": ([HUMAN, called(LOOK), SEEN, GPT], WHOLE),
    "ShareGPT's with calls in a row": (
        [HUMAN, GPT, called(LOOK), called([as_json(WAIT), LOOK]), SEEN, SEEN, GPT],
        [USER, calling(LOOK, WAIT, LOOK, content="Nowhere."), RESULT, RESULT, ANSWER],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("streaming", [False, True])
def test_calls_are_read_in_the_shapes_that_data_have(tmp_path: Path, name: str, streaming: bool) -> None:
    """In JSON Lines and in Parquet, where a struct gives each call the arguments of all."""
    messages, expected = SHAPES[name]
    rows = [{"messages": messages}, {"messages": [USER, ANSWER]}, {"messages": [USER, calling(WAIT), RESULT, ANSWER]}]
    if "from" in messages[0]:
        rows[1:] = [{"messages": [HUMAN, GPT]}, {"messages": [HUMAN, called(WAIT), SEEN, GPT]}]
    if name in ("OpenAI's first", "calls as text"):
        rows = rows[:2]
    path = write_rows(tmp_path / "a.jsonl", rows)
    table = str(tmp_path / "a.parquet")
    if name == "OpenAI's":
        # A column has one type, so that all arguments are text.
        rows[2]["messages"][1] = calling(as_json(WAIT))
    pq.write_table(pa.Table.from_pylist(rows), table)
    # `datasets` waits five seconds at the end of a stream of Parquet; one is read in the next test.
    for source in (path,) if streaming else (path, table):
        found = load(source, streaming=streaming)
        assert has_calls([*found])
        by_length = sorted((row["messages"] for row in found), key=lambda one: one != expected)
        assert by_length[0] == expected and [USER, ANSWER] in by_length and len(by_length) == len(rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_arguments_that_a_table_lacks_are_left_out(tmp_path: Path, streaming: bool) -> None:
    other = {"name": "ask", "arguments": {"who": {"name": "Ann"}, "seconds": 0.5}}
    nested = {"name": "ask", "arguments": {"who": {"age": 7}, "place": "here"}}
    rows = [{"messages": [USER, calling(function), RESULT, ANSWER]} for function in (LOOK, other, nested)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert "null" in json.dumps(pq.read_table(tmp_path / "a.parquet").to_pylist())
    found = list(load(str(tmp_path / "a.parquet"), streaming=streaming))
    assert all(row in found for row in rows)


NAMELESS = "not a name with an object of arguments"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, calling({"name": " ", "arguments": {}})], NAMELESS),
        ([USER, calling({"name": "look"})], NAMELESS),
        ([USER, calling({"name": "look", "arguments": "{place"})], NAMELESS),
        ([USER, calling({"name": "look", "arguments": "[1]"})], NAMELESS),
        ([USER, {**ANSWER, "tool_calls": [{"id": "1"}]}], NAMELESS),
        ([USER, {**ANSWER, "tool_calls": [{"function": "look"}]}], NAMELESS),
        ([USER, {**ANSWER, "function_call": 7}], NAMELESS),
        ([HUMAN, called("look at it")], "has the call 'look at it', not a name"),
        ([HUMAN, called("")], "has an empty message of the assistant"),
        ([HUMAN, called("[]")], "has an empty message of the assistant"),
        ([HUMAN, called(as_json(LOOK)), GPT], "two messages of the assistant in a row"),
        ([USER, ANSWER, calling(LOOK)], "two messages of the assistant in a row"),
        ([{**USER, "tool_calls": [{"function": LOOK}]}, ANSWER], "calls a tool in a message of the user"),
        ([USER, {**calling(LOOK), "content": ["Hello"]}], r"has the content \['Hello'\], not text"),
        ([USER, calling(LOOK), {"role": "tool", "content": None}], "has the content None, not text"),
        (
            [HUMAN, called('{"name": "look", "arguments": {"a": [NaN]}}')],
            r"has a number that JSON cannot hold in the call {'a': \[nan\]}",
        ),
    ],
)
def test_calls_that_cannot_be_read_are_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        read_messages(messages, "messages", calls=True)


def test_calls_are_read_in_conversations_and_answers_and_not_in_prompts() -> None:
    for messages in ([USER, calling(LOOK), RESULT], [HUMAN, called(LOOK), SEEN]):
        with pytest.raises(ShapeError, match="calls a tool, which is not supported here"):
            read_messages(messages, "prompt")
        with pytest.raises(ShapeError, match="chosen calls a tool, which is not supported here"):
            read_pair({side: [*messages, ANSWER, messages[0], ANSWER] for side in ("chosen", "rejected")}, None)
        pair = read_pair({"chosen": [*messages[1:], ANSWER], "rejected": messages[1:2]}, [USER])
        assert [one["role"] for one in pair["chosen"]] == ["assistant", "tool", "assistant"]
        assert pair["chosen"][0]["tool_calls"] == pair["rejected"][0]["tool_calls"] and is_informative(pair)
        for wrong in (messages[1:], [*messages[1:], messages[0], ANSWER], [messages[2], ANSWER]):
            with pytest.raises(ShapeError):
                read_pair({"chosen": wrong, "rejected": [ANSWER]}, [USER])


JSON = st.recursive(
    st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@given(arguments=st.dictionaries(st.text(), JSON, max_size=3), name=st.text(min_size=1).filter(str.strip))
def test_all_forms_of_a_call_mean_the_same(arguments: dict[str, Any], name: str) -> None:
    function = {"name": name, "arguments": arguments}
    expected = [USER, calling(function)]
    for form in (
        calling(function),
        calling(as_json(function)),
        {"role": "assistant", "function_call": as_json(function)},
        {"role": "assistant", "tool_calls": json.dumps([{"type": "function", "function": function}])},
        called(function),
        called([as_json(function)]),
    ):
        assert read_messages([USER, form], "messages", calls=True) == expected
    assert read_messages(expected, "messages", calls=True) == expected


def test_data_without_calls_have_the_type_that_they_had_and_join_those_with_calls(tmp_path: Path) -> None:
    plain = write_rows(
        tmp_path / "plain.jsonl", [{"messages": [{**one, "tool_calls": None} for one in (USER, ANSWER)]}]
    )
    found = load(plain)
    assert found.features == {"messages": MESSAGES} and not has_calls(found)
    assert found[0] == {"messages": [USER, ANSWER]}
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"messages": WHOLE}])
    for streaming in (False, True):
        for paths in ((plain, mixed), (mixed, plain)):
            rows = load(*paths, streaming=streaming)
            assert rows.features == {"messages": CALLING} and has_calls([*rows] if streaming else rows)
            assert sorted((row["messages"] for row in rows), key=len) == [[USER, ANSWER], WHOLE]


def test_rows_with_faults_and_calls_are_dropped_and_kept(tmp_path: Path) -> None:
    function = {"name": "add", "arguments": {"a": 3.141592653589793, "b": "0.1", "c": [None, "\u2028é"]}}
    rows = [[HUMAN], [HUMAN, called(function)], [HUMAN, GPT], [HUMAN, called("?")]]
    path = write_rows(tmp_path / "a.jsonl", [{"conversations": row} for row in rows])
    with pytest.raises(UserError, match=r"row 0: .* and 1 more of 4 \(3\)"):
        load(path)
    kept = load(path, drop_bad_rows=True)
    assert [row["messages"] for row in kept] == [[USER, calling(function)], [USER, ANSWER]]


@pytest.mark.parametrize(
    "function", [{"name": "a<|end|>", "arguments": {}}, {"name": "a", "arguments": {"<|end|>": 1}}]
)
def test_names_and_arguments_may_not_spell_special_tokens(function: dict[str, Any]) -> None:
    tokens = special_tokens(tokenizer())
    for one in (function, {"name": "a", "arguments": {"b": [{"c": "of <|user|>"}]}}):
        messages = [USER, {**calling(one), "content": None}]
        with pytest.raises(ShapeError, match=r"messages contains <\|(end|user)\|>, which the tokenizer reads"):
            refuse_special_tokens({"messages": messages}, tokens)
        (broken,) = escape_tokens(messages[1:], tokens)
        refuse_special_tokens({"messages": [broken]}, tokens)
        assert json.loads(json.dumps(broken).replace("< |", "<|")) == messages[1]
    refuse_special_tokens({"messages": WHOLE}, tokens)
    assert escape_tokens(WHOLE, tokens) == WHOLE


@pytest.mark.parametrize("marked", [True, False])
def test_calls_are_learned_and_results_are_not(tmp_path: Path, marked: bool) -> None:
    """By the template's marks around what the assistant says, or by the prefixes of a template without them."""
    model, words = save_model(tmp_path / "model"), tokenizer()
    if not marked:
        words.chat_template = words.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
        words.save_pretrained(model)
    data = write_rows(tmp_path / "a.jsonl", [{"messages": WHOLE}, {"messages": conversation("Why?", "Because.")}] * 9)
    args = SFTConfig(
        str(tmp_path / "output"), assistant_only_loss=True, max_length=128, use_cpu=True, bf16=False, report_to="none"
    )
    tokenizer_, train, _ = load_inputs("conversation", DataArguments(data), args, ModelConfig(model))
    row = next(row for row in train if row["messages"] == WHOLE)
    learned = tokenizer_.decode([token for token in row["labels"] if token >= 0])
    assert learned == "<|call|>look<|argument|>place=a box<|argument|>seconds=7<|end|>Nowhere.<|end|>"
    assert RESULT["content"] in tokenizer_.decode(row["input_ids"])


LISTED = {"type": "function", "function": {"name": "look", "description": "Look in a place.", "parameters": {}}}
WAITING = {"name": "wait", "parameters": {"properties": {"seconds": {"type": "number"}}}}
TEXT = json.dumps([LISTED, {"type": "function", "function": WAITING}])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", [[LISTED, WAITING], TEXT, [json.dumps(LISTED), json.dumps(WAITING)]])
def test_tools_are_read_in_any_form_and_join_rows_without_them(tmp_path: Path, form: Any, streaming: bool) -> None:
    rows = [{"messages": WHOLE, "tools": form}, {"messages": [USER, ANSWER], "tools": None}]
    own = write_rows(tmp_path / "own.jsonl", rows)
    plain = write_rows(tmp_path / "plain.jsonl", [{"messages": [USER, ANSWER]}])
    for paths in ((own,), (own, plain), (plain, own)):
        found = [row.get("tools") for row in load(*paths, streaming=streaming)]
        assert [json.loads(one) for one in found if one is not None] == [json.loads(TEXT)]


def test_tools_in_a_table_are_without_the_keys_of_other_tools(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ANSWER], "tools": [{"type": "function", "function": WAITING}, LISTED | {"strict": True}]}
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (row,) = load(str(tmp_path / "a.parquet"))
    assert "null" not in row["tools"] and json.loads(row["tools"])[0]["function"] == WAITING


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (7, "tools has the tool 7, not a function with a name"),
        ("look", "tools has the tool 'look', not a function with a name"),
        ([{"type": "function"}], r"tools has the tool \{'type': 'function'\}, not a function with a name"),
        ([{"name": "look", "description": "<|end|>"}], r"tools contains <\|end\|>, which the tokenizer reads"),
    ],
)
def test_tools_that_cannot_be_read_are_refused_by_their_row(tmp_path: Path, tools: Any, said: str) -> None:
    rows = [{"messages": [USER, ANSWER], "tools": one} for one in (None, tools)]
    args = DataArguments([write_rows(tmp_path / "a.jsonl", rows)], validation_share=0.0)
    with pytest.raises(UserError, match=f"row 1: {said}") as error:
        load_splits(args, "conversation", evaluation=False, special_tokens=special_tokens(tokenizer()))
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("lists", [True, False], ids=["lists tools", "ignores tools"])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("answers_only", [True, False])
def test_the_chat_template_gets_the_tools_of_each_row(
    tmp_path: Path, answers_only: bool, marked: bool, lists: bool
) -> None:
    model, words = save_model(tmp_path / "model"), tokenizer()
    listing = (
        "{%- if tools is not none -%}{%- for tool in tools -%}<|system|>{{ tool | tojson }}{{ eos_token }}{%- else -%}"
        "{{ raise_exception('an empty list of tools') }}{%- endfor -%}{%- endif -%}"
        if lists
        else ""
    )
    words.chat_template = words.chat_template.replace("{{- bos_token -}}", "{{- bos_token -}}" + listing)
    if not marked:
        words.chat_template = words.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    words.save_pretrained(model)
    rows = [{"messages": WHOLE, "tools": [LISTED]}, {"messages": [USER, ANSWER], "tools": [WAITING]}]
    rows += [{"messages": conversation("Why?", "Because."), "tools": one} for one in (None, [])]
    data = DataArguments(write_rows(tmp_path / "a.jsonl", rows * 6))
    args = SFTConfig(
        str(tmp_path / "o"),
        assistant_only_loss=answers_only,
        max_length=256,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    tokenizer_, train, _ = load_inputs("conversation", data, args, ModelConfig(model))
    for row in train:
        text = tokenizer_.decode(row["input_ids"])
        listed = [schema["function"]["name"] for schema in json.loads(row["tools"] or "[]")]
        assert [name for name in ("look", "wait") if f'"name": "{name}"' in text] == (listed if lists else [])
        learned = tokenizer_.decode([token for token in row["labels"] if token >= 0])
        assert ("<|system|>" in learned) == (lists and bool(listed) and not answers_only)
        assert learned.endswith(f"{row['messages'][-1]['content']}<|end|>")


@pytest.mark.parametrize("marked", [True, False])
def test_a_stream_mixes_rows_with_tools_and_without_them(tmp_path: Path, marked: bool) -> None:
    model, words = save_model(tmp_path / "model"), tokenizer()
    if not marked:
        words.chat_template = words.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    words.chat_template = words.chat_template.replace("{{- bos_token -}}", "{{- bos_token -}}{{- tools | tojson -}}")
    words.save_pretrained(model)
    own = write_rows(tmp_path / "own.jsonl", [{"messages": WHOLE, "tools": [LISTED]}] * 3)
    plain = write_rows(tmp_path / "plain.jsonl", [{"messages": [USER, ANSWER]}] * 3)
    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    for paths in ([own, plain], [plain, own]):
        args = SFTConfig(str(tmp_path / "o"), assistant_only_loss=True, max_length=256, **options)
        data = DataArguments(paths, dataset_streaming=True, validation_share=0.0)
        tokenizer_, train, _ = load_inputs("conversation", data, args, ModelConfig(model))
        rows = list(train)
        assert sum(row.get("tools") is not None for row in rows) == 3 and len(rows) == 6
        texts = [tokenizer_.decode(row["input_ids"]) for row in rows if not marked]
        assert sum('"name": "look"' in text for text in texts) == (0 if marked else 3)


def test_the_tools_count_towards_the_longest_prompt(tmp_path: Path) -> None:
    model, words = save_model(tmp_path / "model"), tokenizer()
    words.chat_template = "{{ tools | tojson }}" + words.chat_template
    words.save_pretrained(model)
    tools = [LISTED | {"function": LISTED["function"] | {"description": "again " * 99}}]
    data = DataArguments(write_rows(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER], "tools": tools}] * 20))
    args = SFTConfig(str(tmp_path / "o"), max_length=64, use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(UserError, match="max_length: 64: every prompt is longer"):
        load_inputs("conversation", data, args, ModelConfig(model))


def test_a_template_without_calls_is_refused_for_data_with_them(tmp_path: Path) -> None:
    model, words = save_model(tmp_path / "model"), tokenizer()
    words.chat_template = CHATML
    words.save_pretrained(model)
    args = SFTConfig(str(tmp_path / "output"), max_length=128, max_steps=1, use_cpu=True, bf16=False, report_to="none")
    data = write_rows(tmp_path / "a.jsonl", [{"messages": WHOLE}, {"messages": [USER, ANSWER]}] * 9)
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"^model_name_or_path: \S+: its chat template .* \(it omits tool calls"):
            load_inputs("conversation", DataArguments(data, dataset_streaming=streaming), args, ModelConfig(model))
    plain = write_rows(tmp_path / "b.jsonl", [{"messages": [USER, ANSWER]}] * 18)
    assert isinstance(load_inputs("conversation", DataArguments(plain), args, ModelConfig(model))[1], Dataset)


def test_further_keys_of_an_answer_and_repeated_prompts_do_not_make_it_a_dialogue() -> None:
    thought = {**ANSWER, "thinking": "Well."}
    assert read_pair({"chosen": [thought], "rejected": [ANSWER]}, [USER])["chosen"] == [ANSWER]
    prompt = [{"role": "assistant", "content": "Hello!"}, USER]
    pair = read_pair({"chosen": [*prompt, ANSWER], "rejected": [*prompt, {**ANSWER, "content": "No."}]}, prompt)
    assert pair["chosen"] == [ANSWER]


DIALOGUE = [calling(LOOK), {"role": "tool", "content": "12", "name": "look"}, ANSWER]
REFUSAL = [{"role": "assistant", "content": "I cannot."}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        (USER["content"], []),
        ([USER], []),
        (None, [USER]),
        (None, [{"role": "system", "content": "Be kind."}, USER, ANSWER, USER]),
        ([USER], [USER]),
        (USER["content"], [USER]),
    ],
)
def test_answers_with_calls_are_read_whatever_their_prompt_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prompt: Any, before: list[Any], side: str, streaming: bool
) -> None:
    caplog.set_level("INFO", "pipeline")
    pair = {"chosen": [*before, *REFUSAL], "rejected": [*before, *REFUSAL]} | {side: [*before, *DIALOGUE]}
    path = write_rows(tmp_path / "a.jsonl", [pair | ({"prompt": prompt} if prompt else {})] * 2)
    args = DataArguments(path, validation_share=0.0, dataset_streaming=streaming)
    (first, *_) = load_splits(args, "preference", evaluation=False)[0]
    assert first["prompt"] == (before or [USER])
    assert [turn["role"] for turn in first[side]] == ["assistant", "tool", "assistant"]
    assert first[side][0]["tool_calls"] and first[side][1]["name"] == "look"
    assert "are not used" not in caplog.text.replace("'prompt' are not used", ""), "the name of a result is kept"


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (
            {"chosen": [USER, *DIALOGUE[:2]], "rejected": [USER, *REFUSAL]},
            "chosen ends with the role 'tool', not assistant",
        ),
        (
            {"chosen": [USER, *DIALOGUE, USER, ANSWER], "rejected": [USER, *REFUSAL]},
            "chosen calls a tool, which is not",
        ),
        ({"chosen": DIALOGUE, "rejected": REFUSAL}, "there is no prompt"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER]}, "rejected ends with the role 'user', not assis"),
        ({"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "Other?"}, ANSWER]}, "the same prompt"),
    ],
)
def test_pairs_of_conversations_are_refused_for_the_right_reason(pair: dict[str, Any], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        read_pair(pair, None)
