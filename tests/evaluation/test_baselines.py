"""What is reached without training."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.evaluation.baselines import (
    Elicitation,
    elicit_answers,
    find_constant,
    measure_best_of,
    measure_constant,
    measure_reasoning,
)
from pipeline.evaluation.checks import check
from pipeline.evaluation.evaluate_yaml import RunFacts, complete
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.metrics import ChatModel
from pipeline.evaluation.results import StageResult
from pipeline.models.generation import Completion
from pipeline.preferences.judges import ANNOTATORS
from recipes.worlds.pocket.problems import WORKING, pose
from recipes.worlds.pocket.remarks import BRISK_CLOSINGS, CONSTANTS, KIND_CLOSINGS
from tests.helpers.word_model import SPECIAL, word_model_config, word_tokenizer

WORDS = ("What", "is", "it?", "red", "blue", "green", "one", "two", "three", "four", "five")
PLAIN = "A fox is red."


def rows(asked: str, number: int = 4) -> list[dict[str, Any]]:
    """Return prompts to which an answer with "red" is right."""
    prompt = [{"role": "user", "content": asked}]
    return [{"id": i, "kind": "", "prompt": prompt, "require": [["red"]]} for i in range(number)]


QUESTIONS = rows("Which colour is a fox?")
ORDERS = rows("Say which colour a fox is.")


@dataclass
class Parrot:
    """A chat model that says the same to everything."""

    says: str = PLAIN
    asked: list[Any] = field(default_factory=list)

    def sample(self, prompts: Sequence[Any], **options: Any) -> list[list[Completion]]:
        """Return one completion of each prompt."""
        self.asked.append(prompts)
        return [[Completion(self.says, [], True)] for _ in prompts]


def test_there_are_twenty_constants_each_around_the_answer() -> None:
    assert len(set(CONSTANTS)) == 20 and all(text.count("…") == 1 for text in CONSTANTS)
    assert {f"… {closing}" for closing in (*KIND_CLOSINGS, *BRISK_CLOSINGS)} < set(CONSTANTS)


@pytest.mark.parametrize(("prompts", "closings"), [(QUESTIONS, KIND_CLOSINGS), (ORDERS, BRISK_CLOSINGS)])
def test_the_best_constant_suits_the_prompts(prompts: list[dict[str, Any]], closings: Sequence[str]) -> None:
    plain = [PLAIN] * len(prompts)
    assert find_constant(plain, plain, prompts).removeprefix("… ") in closings


def test_the_constant_is_chosen_on_validation_prompts_and_reported_on_test_prompts() -> None:
    chat, result = Parrot(), StageResult("2_sft")
    plain = [[PLAIN]] * len(ORDERS)
    matches = {"win_rate": (plain, plain), "win_rate_greedy": (plain, plain)}
    measure_constant(result, chat, HeldOut(prompts=ORDERS, validation=QUESTIONS), matches)  # type: ignore[arg-type]
    for metric in matches:
        assert result.metrics[f"constant/{metric}"].value == 0.0, "kind remarks, which questions want, annoy here"
        assert result.texts["constant"][metric.replace("win_rate", "text")].removeprefix("… ") in KIND_CLOSINGS
    assert len(chat.asked) == 3 and all(len(asked) == len(QUESTIONS) for asked in chat.asked), "only validation answers"


def test_answers_begun_with_their_own_beginning_are_the_same_answers() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(word_model_config(WORDS, initializer_range=0.5))
    with torch.no_grad():
        # Without special tokens, its answers consist of words.
        model.lm_head.weight[: len(SPECIAL)] = 0.0
    chat = ChatModel(model.eval(), word_tokenizer(WORDS), max_new_tokens=8)
    problems = [{"prompt": [{"role": "user", "content": text}]} for text in ("What is it?", "it? one", "red two blue")]
    greedy = [completion.text for (completion,) in chat.sample([row["prompt"] for row in problems])]
    for row, answer in zip(problems, greedy, strict=True):
        words = answer.split()
        assert len(words) > 3, "otherwise nothing is compared"
        for begun in range(1, len(words)):
            assert elicit_answers(chat, [row], Elicitation("", " ".join(words[:begun]))) == [answer]
    way = Elicitation("", "five four three")
    others = elicit_answers(chat, problems, way)
    assert all(answer.startswith("five four three") and len(answer.split()) <= 8 for answer in others)
    assert elicit_answers(chat, problems[:1], way) == others[:1], "whatever else is in the batch"


def problems(wanted: str) -> list[dict[str, Any]]:
    """Return problems to which an answer that begins with `wanted` is right."""
    return [{"id": i, "kind": "", "prompt": [{"role": "user", "content": "it?"}], "wanted": wanted} for i in range(2)]


def begins_as_wanted(answers: Sequence[str], rows: Sequence[Any]) -> list[bool]:
    return [answer.startswith(row["wanted"]) for answer, row in zip(answers, rows, strict=True)]


def test_of_several_ways_to_ask_the_best_on_other_problems_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    chat = ChatModel(LlamaForCausalLM(word_model_config(WORDS)).eval(), word_tokenizer(WORDS), max_new_tokens=8)
    asked: list[Any] = []
    encode = ChatModel.encode
    monkeypatch.setattr(ChatModel, "encode", lambda self, prompts: asked.append(prompts) or encode(self, prompts))
    example = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "one two"}]
    data: dict[str, Any] = {"grader": begins_as_wanted, "shots": [example]}
    result = StageResult("2_sft")
    held_out = HeldOut(problems=problems("red"), trials=problems("blue"), **data)
    measure_reasoning(result, chat, held_out, ["red", "blue", "green"])
    assert result.texts["elicited"] == {"text": "blue"} and result.metrics["elicited/pass@1"].value == 0.0
    shown = [row["prompt"] for row in problems("")]
    assert asked == [shown, shown, shown, [[*example, *prompt] for prompt in shown], shown]


@dataclass
class Talker:
    """A chat model whose n-th answer to a prompt says n."""

    def sample(self, prompts: Sequence[Any], samples: int = 1, **options: Any) -> list[list[Completion]]:
        """Return the completions of each prompt."""
        return [[Completion(f"{number}. {PLAIN}", [], True) for number in range(samples)] for _ in prompts]


def test_the_answer_with_the_highest_score_is_the_best_of_several() -> None:
    def rate(conversations: Sequence[Any]) -> list[float]:
        """Prefer the third answer to the first prompt, and the second one to any other."""
        wanted = {True: "2", False: "1"}
        return [float(text[-1]["content"][0] == wanted[text[0]["content"] == "it?"]) for text in conversations]

    result = StageResult("3_reward")
    other = {"id": 2, "kind": "", "prompt": [{"role": "user", "content": "What?"}], "wanted": "2"}
    held_out = HeldOut(problems=[*problems("2"), other], prompts=QUESTIONS, grader=begins_as_wanted)
    chats: Any = dict.fromkeys(("problems", "prompts"), Talker())
    measure_best_of(result, chats, held_out, [2, 4], rate, ANNOTATORS)
    assert result.metrics["best_of_4/pass@1"].value == pytest.approx(2 / 3)
    answers = {name: [e["answer"] for e in result.examples if e["metric"] == name] for name in result.metrics}
    assert answers["best_of_4/pass@1"] == [f"{number}. {PLAIN}" for number in (2, 2, 1)]
    assert answers["best_of_2/pass@1"] == [f"{number}. {PLAIN}" for number in (0, 0, 1)], "of the first two"
    assert answers["best_of_4/win_rate"] == [f"1. {PLAIN}"] * len(QUESTIONS)
    assert result.metrics["best_of_4/win_rate"].value == 0.5, "both answers are right"


@pytest.mark.parametrize(("best_of", "wrong"), [(4, []), (0, []), ([4, 16], []), (-1, [-1]), ([0, 4, 5000], [0, 5000])])
def test_numbers_of_answers_that_cannot_be_sampled_are_refused(best_of: Any, wrong: list[int]) -> None:
    facts = RunFacts("runs/mine")
    content = complete({"best_of": best_of}, facts)
    assert [problem.value for problem in check(content, facts) if problem.field == "best_of"] == wrong


def test_worked_answers_begin_as_the_elicited_ones_do() -> None:
    problem = pose(random.Random(0), "train")
    assert problem.solution(with_steps=True).startswith(f"{WORKING} ")
    assert not problem.solution(with_steps=False).startswith(WORKING)
