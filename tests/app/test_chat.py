"""The chat in the terminal: several turns, another stage, and answers that cannot act on the terminal."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipeline.__main__ import main
from pipeline.app.models import Loaded, Models, Sampling, write
from pipeline.models.generation import encode_prompts, generate


def chat(path: Path, typed: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return main(["chat", str(path), "--max_new_tokens", "8", *options])


def test_it_answers_in_turns_and_switches_stages(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations: list[list[dict[str, str]]] = []
    encode = Loaded.encode

    def remember(self: Loaded, messages: list[dict[str, str]], *options: Any) -> list[int]:
        conversations.append(list(messages))
        return encode(self, messages, *options)

    monkeypatch.setattr(Loaded, "encode", remember)
    assert chat(run / "4_grpo", "What is 12?\nAnd 21?\n/stage 2_sft\nWho?\n/new\nA cat.\n/stage x\n", monkeypatch) == 0
    assert chat(run / "4_grpo", "/help\n/example fish\nOne.\n/example\n/example problem\nTwo.\n", monkeypatch) == 0
    assert [len(messages) for messages in conversations] == [1, 3, 5, 1, 1, 1, 1, 3], "an example begins anew"
    assert conversations[1][0]["content"] == "What is 12?" and conversations[1][1]["role"] == "assistant"
    printed = capsys.readouterr().out
    assert "2_sft answers from now on" in printed
    assert "/stage: x: " in printed, "a stage that is not there ends nothing"
    assert "/example KIND" in printed and "/example: fish: choose from: problem, prompt" in printed
    assert conversations[5][0]["content"] == conversations[6][0]["content"] == "What is 0 and 0?"
    assert printed.count("Asked: What is 0 and 0?") == 2 and printed.count("The right result is 0.") >= 1


def test_each_question_begins_anew_in_a_run_of_single_questions(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pocket's models answered the second question with the words of the first."""
    conversations: list[list[dict[str, str]]] = []
    encode = Loaded.encode

    def remember(self: Loaded, messages: list[dict[str, str]], *options: Any) -> list[int]:
        conversations.append(list(messages))
        return encode(self, messages, *options)

    monkeypatch.setattr(Loaded, "encode", remember)
    (tmp_path / "4_grpo").symlink_to(run / "4_grpo")
    (tmp_path / "run.json").write_text("{}")
    question, answer = {"role": "user", "content": "What is 12?"}, {"role": "assistant", "content": "12"}
    data = tmp_path / "data" / "sft" / "test.parquet"
    data.parent.mkdir(parents=True)
    Dataset.from_list([{"messages": [question, answer]}] * 2).to_parquet(data)
    assert chat(tmp_path / "4_grpo", "What is 12?\nAnd 21?\n/keep\nWho?\nA cat.\n", monkeypatch) == 0
    assert [len(messages) for messages in conversations] == [1, 1, 3, 5]
    assert capsys.readouterr().err.count("/keep") == 1, "it says so, once"

    conversations.clear()
    Dataset.from_list([{"messages": [question, answer] * 2}] * 2).to_parquet(data)
    assert chat(tmp_path / "4_grpo", "What is 12?\nAnd 21?\n", monkeypatch) == 0
    assert [len(messages) for messages in conversations] == [1, 3], "a run with longer conversations"
    assert "/keep" not in capsys.readouterr().err


def test_a_conversation_beyond_the_context_is_refused_with_both_numbers(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(run / "4_grpo", "cat " * 300 + "\nWhat is 12?\n", monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert "tokens: is longer than the context of 4_grpo, which is 256 tokens" in lines[0]
    assert len(lines) >= 2, "the next question is answered"


def test_control_characters_of_an_answer_are_shown_and_not_sent_to_the_terminal(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b]0;owned\x07\x1b[31m\u202egnp"
    monkeypatch.setattr("pipeline.app.models.Answer.text", hostile)
    chat(run / "2_sft", "What is 12?\n", monkeypatch)
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert "␛]0;owned␇" in printed and "⟨U+202E⟩" in printed


class Terminal(io.StringIO):
    """Lines that somebody types."""

    def isatty(self) -> bool:
        return True


def test_the_greeting_shows_control_characters_of_the_runs_card(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "4_grpo").symlink_to(run / "4_grpo")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("## What may I ask?\n\nAbout \x1b]0;owned\x07foxes.\n")
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert main(["chat", str(tmp_path / "4_grpo")]) == 0
    printed = capsys.readouterr().out
    assert "About ␛]0;owned␇foxes." in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("folder", "message"), [("", "is a run; name one of its stages"), ("3_reward", "reward model")]
)
def test_what_cannot_chat_is_refused(
    run: Path, folder: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        chat(run / folder, "", monkeypatch)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_bytes_that_are_no_text_end_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is \xff?\nWhat is 12?\n"), "utf-8"))
    assert main(["chat", str(run / "4_grpo"), "--max_new_tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_streamed_answers_are_those_of_the_sampler(run: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(run / "4_grpo").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "4_grpo")
    loaded = Loaded("4_grpo", model, tokenizer, 256)
    for prompt in ("What is 12?", "The cat sat"):
        (ids,) = encode_prompts(tokenizer, [[{"role": "user", "content": prompt}]])
        *_, answer = write(loaded, ids, Sampling(max_new_tokens=20))
        ((expected,),) = generate(model, tokenizer, [ids], max_new_tokens=20)
        assert [token.id for token in answer.tokens] == expected.tokens
        assert "".join(token.text for token in answer.tokens) == tokenizer.decode(expected.tokens)
        logits = model(input_ids=torch.tensor([[*ids, *expected.tokens]])).logits[0, len(ids) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        for place, token in enumerate(answer.tokens):
            assert token.log_prob == pytest.approx(float(log_probs[place, token.id]), abs=1e-3)
            best = log_probs[place].topk(5).indices.tolist()
            assert [text for text, _ in token.alternatives] == [tokenizer.decode([ids]) for ids in best]


def test_an_adapter_is_a_stage_of_the_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "2_sft").symlink_to(run / "2_sft")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(run / "2_sft"), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "4_grpo")
    AutoTokenizer.from_pretrained(run / "2_sft").save_pretrained(tmp_path / "4_grpo")
    models = Models(tmp_path)
    assert models.names == ["2_sft", "4_grpo"]
    texts = []
    for name in models.names:
        loaded = models.get(name)
        *_, answer = write(loaded, loaded.encode([{"role": "user", "content": "What is 12?"}]), Sampling(8))
        texts.append(answer.text)
    assert texts[0] == texts[1], "an adapter that is not trained changes nothing"


@pytest.mark.parametrize("temperature", [1e-300, 1e-45])
def test_a_temperature_just_above_0_is_greedy(run: Path, temperature: float) -> None:
    """Logits that are divided by it are infinite in float32."""
    loaded = Models(run).get("4_grpo")
    prompt = loaded.encode([{"role": "user", "content": "What is 12?"}])
    *_, cold = write(loaded, prompt, Sampling(8, temperature))
    *_, greedy = write(loaded, prompt, Sampling(8))
    assert [token.id for token in cold.tokens] == [token.id for token in greedy.tokens]


def test_sampling_settings_are_kept(run: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(run / "4_grpo").eval()
    loaded = Loaded("4_grpo", model, AutoTokenizer.from_pretrained(run / "4_grpo"), 256)

    def sampled(**settings: float) -> list[int]:
        *_, answer = write(loaded, [1, 9, 8], Sampling(max_new_tokens=30, **settings))  # type: ignore[arg-type]
        return [token.id for token in answer.tokens]

    greedy = sampled()
    assert sampled(temperature=1.0, top_k=1) == greedy == sampled(temperature=1.0, top_p=1e-6)
    assert sampled(temperature=1.0, seed=1) == sampled(temperature=1.0, seed=1) != sampled(temperature=1.0, seed=2)
