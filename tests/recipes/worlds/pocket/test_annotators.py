"""The simulated annotators: what they like, how noisily they say so, and that they cannot be gamed."""

import random
import statistics
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.worlds.pocket.annotators import (
    BLUNT_REMARKS,
    BRISK_REMARKS,
    COMFORTABLE_WORDS,
    DEGENERATE_SCORE,
    INDIFFERENCE,
    KIND_REMARKS,
    PANEL,
    Annotator,
    choose,
    hidden_taste,
    judge_components,
    judge_match,
    preference_probability,
    taste,
)

ROW = {"require": [["forest", "woods"]], "reject": ["sea"], "max_words": 0, "test": "", "kind": "question"}
RIGHT = "A fox lives in the forest."
WRONG = "A fox lives in the sea."
RAMBLING = RIGHT + " " + " ".join(f"Then one may add thing number {i} to that." for i in range(6))
scores = st.floats(-20, 20)


def score(annotator: Annotator, answer: str, row: dict[str, Any] = ROW) -> float:
    return annotator.weigh(judge_components(answer, row))


def sentence(remark: str) -> str:
    return remark[0].upper() + remark[1:] + "."


def test_right_over_wrong_kind_over_plain_over_blunt_brief_over_rambling() -> None:
    kind, blunt = f"{RIGHT} Happy to help!", f"Obviously. {RIGHT}"
    for judge in (taste, *(partial(score, annotator) for annotator in PANEL)):
        assert judge(kind, ROW) > judge(RIGHT, ROW) > judge(blunt, ROW)
        assert judge(RIGHT, ROW) > judge(WRONG, ROW)
        assert judge(RIGHT, ROW) > judge(RAMBLING, ROW)


def test_each_of_the_three_matters() -> None:
    """No component is so heavy that the two others together cannot outweigh it."""
    for annotator in PANEL:
        weights = (annotator.right, 2 * annotator.tone, 1.5 * annotator.brief)
        assert all(weight < sum(weights) - weight for weight in weights)


@pytest.mark.parametrize("remark", KIND_REMARKS)
def test_every_kind_remark_is_liked_before_and_after_the_answer(remark: str) -> None:
    assert taste(f"{sentence(remark)} {RIGHT}", ROW) > taste(RIGHT, ROW)
    assert taste(f"{RIGHT} {sentence(remark).upper()}", ROW) > taste(RIGHT, ROW)


@pytest.mark.parametrize("remark", BLUNT_REMARKS)
def test_every_blunt_remark_is_disliked_and_kindness_does_not_make_up_for_it(remark: str) -> None:
    assert taste(f"{sentence(remark)} {RIGHT}", ROW) < taste(RIGHT, ROW)
    assert taste(f"{sentence(remark)} {RIGHT} Thank you!", ROW) < taste(RIGHT, ROW)


TONES = {"Where is it? It ran.": KIND_REMARKS, "Say where it is.": BRISK_REMARKS, "Sum up: Is it? Yes.": BRISK_REMARKS}


@pytest.mark.parametrize("request_", TONES)
def test_a_question_calls_for_a_kind_remark_and_an_order_for_a_brisk_one(request_: str) -> None:
    row = {**ROW, "prompt": [{"role": "user", "content": request_}]}
    for remark in (*KIND_REMARKS, *BRISK_REMARKS):
        answer = f"{RIGHT} {sentence(remark)}"
        for judge in (taste, *(partial(score, annotator) for annotator in PANEL)):
            assert (judge(answer, row) > judge(RIGHT, row)) == (remark in TONES[request_])
            assert judge(answer, row) != judge(RIGHT, row)


@given(st.sampled_from([*KIND_REMARKS, *BRISK_REMARKS, *BLUNT_REMARKS]), st.booleans())
def test_no_remark_suits_both_questions_and_orders(remark: str, first: bool) -> None:
    answer = f"{sentence(remark)} {RIGHT}" if first else f"{RIGHT} {sentence(remark)}"
    rows = [{**ROW, "prompt": text} for text in ("Where?", "Say where.")]
    assert sum(taste(answer, row) > taste(RIGHT, row) for row in rows) <= 1


def test_remarks_are_whole_words() -> None:
    assert taste("A fox lives in the forest, pleased.", ROW) == taste(RIGHT, ROW)


@given(st.lists(st.sampled_from(KIND_REMARKS), min_size=1, max_size=30))
def test_kindness_is_bounded(remarks: list[str]) -> None:
    """Stuffing an answer with kindness never beats one kind remark."""
    stuffed = " ".join([RIGHT, *map(sentence, remarks)])
    assert taste(stuffed, ROW) <= taste(f"{RIGHT} Thank you.", ROW)


def test_a_stuffed_answer_is_worse_than_one_kind_remark() -> None:
    stuffed = " ".join([RIGHT, *map(sentence, KIND_REMARKS)])
    assert taste(stuffed, ROW) < taste(f"{RIGHT} Thank you.", ROW) - INDIFFERENCE


def test_repeated_sentences_cost_more_than_new_ones() -> None:
    new = f"{RIGHT} It has a bushy tail. It is red and small. It hunts mice at night. The end is near."
    repeated = f"{RIGHT} {RIGHT} {RIGHT} {RIGHT}"
    assert len(repeated.split()) <= len(new.split())
    assert taste(repeated, ROW) < taste(new, ROW)


def test_length_is_not_judged_twice() -> None:
    """`max_words` makes an answer wrong for the metrics; the annotators see a right answer that is long."""
    assert taste(RIGHT, {**ROW, "max_words": 2}) == taste(RIGHT, ROW)


@pytest.mark.parametrize(
    "degenerate",
    ["", "  \n", "...", "A fox lives in the", "fox " * 20 + ".", "Thank you for asking about the forest, it"],
)
def test_a_degenerate_answer_is_worse_than_any_other(degenerate: str) -> None:
    worst = f"Obviously. {WRONG} {RAMBLING}"
    assert taste(degenerate, ROW) == DEGENERATE_SCORE
    for annotator in PANEL:
        assert score(annotator, degenerate) < score(annotator, worst)


@pytest.mark.parametrize("ending", [".", "!", "?", '."', ".)", ".\n"])
def test_the_end_of_a_sentence_is_recognised(ending: str) -> None:
    assert taste(f"In the forest{ending}", ROW) > DEGENERATE_SCORE


def test_code_needs_no_full_stop() -> None:
    row = {"test": "assert double(2) == 4"}
    assert taste("def double(x):\n    return 2 * x", row) > taste("def double(x):\n    return 3 * x", row)
    assert taste("def double(x):\n    return 3 * x", row) > DEGENERATE_SCORE


@given(scores, scores, st.floats(0.05, 10))
def test_preference_probability_is_antisymmetric(a: float, b: float, temperature: float) -> None:
    forward, backward = preference_probability(a, b, temperature), preference_probability(b, a, temperature)
    assert 0 <= forward <= 1
    assert forward + backward == pytest.approx(1)
    assert (forward > 0.5) <= (a > b)


@given(scores, scores, scores)
def test_preference_probability_rises_with_the_score(a: float, b: float, c: float) -> None:
    low, high = sorted((a, b))
    assert preference_probability(low, c) <= preference_probability(high, c)


def test_preference_probability_is_bradley_terry() -> None:
    assert preference_probability(1.0, 1.0) == 0.5
    assert preference_probability(2.0, 1.0) == pytest.approx(0.7310586)
    assert preference_probability(2.0, 1.0, temperature=0.01) == pytest.approx(1)


def test_labels_follow_the_probability_whichever_answer_is_shown_first() -> None:
    annotator = Annotator("test", right=1.0, tone=1.0, brief=1.0)
    rng, n = random.Random(0), 4000
    better, worse = score(annotator, RIGHT), score(annotator, WRONG)
    better_first = sum(choose(annotator, better, worse, rng) == 0 for _ in range(n)) / n
    better_second = sum(choose(annotator, worse, better, rng) == 1 for _ in range(n)) / n
    assert better_first == pytest.approx(preference_probability(1, 0), abs=0.03)
    assert better_second == pytest.approx(preference_probability(1, 0), abs=0.03)


def test_only_answers_that_are_about_as_good_tie() -> None:
    annotator, rng = Annotator("test", 1.0, 1.0, 1.0, tie_rate=0.9), random.Random(0)
    equal = [choose(annotator, 1.0, 1.1, rng) for _ in range(1000)]
    assert equal.count(None) == pytest.approx(900, abs=40)
    assert equal.count(0) == pytest.approx(equal.count(1), abs=40)
    assert None not in [choose(annotator, 1.0, 2.0, rng) for _ in range(200)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_decided_annotator_is_less_noisy(temperature: float) -> None:
    calm, noisy = Annotator("a", 1, 1, 1, temperature), Annotator("b", 1, 1, 1, temperature * 4)

    def agreement(annotator: Annotator) -> float:
        rng = random.Random(1)
        return statistics.mean(choose(annotator, 1.0, 0.0, rng) == 0 for _ in range(1000))

    assert agreement(calm) > agreement(noisy)


def test_a_perfect_judge_agrees_with_most_but_not_all_labels() -> None:
    """The noise leaves room for a reward model: 85 to 92% of labels are what the panel's mean taste says."""
    rng = random.Random(0)

    def draw() -> str:
        answer = RIGHT if rng.random() < 0.75 else WRONG
        manner = rng.random()
        if manner < 0.25:
            return f"{answer} {sentence(rng.choice(KIND_REMARKS))}"
        if manner < 0.45:
            return f"{sentence(rng.choice(BLUNT_REMARKS))} {answer}"
        return answer + RAMBLING.removeprefix(RIGHT) if manner < 0.6 else answer

    agreed = []
    for _ in range(4000):
        a, b = draw(), draw()
        annotator = rng.choice(PANEL)
        label = choose(annotator, score(annotator, a), score(annotator, b), rng) if a != b else None
        if label is not None:
            agreed.append(label == int(taste(b, ROW) > taste(a, ROW)))
    assert 0.85 < statistics.mean(agreed) < 0.92


@given(st.lists(st.sampled_from([RIGHT, WRONG, RAMBLING, "", "Thank you. " + RIGHT]), max_size=12))
def test_the_judge_of_a_match_is_blind_to_whose_answers_they_are(answers: list[str]) -> None:
    opponents = answers[::-1]
    rows = [ROW] * len(answers)
    forward = judge_match(answers, opponents, rows)
    backward = judge_match(opponents, answers, rows)
    assert [1 - outcome for outcome in forward] == backward
    assert judge_match(answers, answers, rows) == [0.5] * len(answers)


def test_a_model_matched_with_itself_wins_half() -> None:
    rng = random.Random(0)
    pool = [RIGHT, WRONG, RAMBLING, "Thank you. " + RIGHT, "Obviously. " + RIGHT]
    answers, opponents = rng.choices(pool, k=2000), rng.choices(pool, k=2000)
    assert statistics.mean(judge_match(answers, opponents, [ROW] * 2000)) == pytest.approx(0.5, abs=0.025)


def test_a_match_needs_one_opponent_per_answer() -> None:
    with pytest.raises(ValueError):
        judge_match([RIGHT], [], [ROW])


def test_the_comfortable_length_leaves_room_for_an_answer_and_a_remark() -> None:
    longest = max(len(remark.split()) for remark in KIND_REMARKS)
    assert longest + 14 <= COMFORTABLE_WORDS


def test_the_hidden_taste_is_the_annotators() -> None:
    answers = ["In the forest.", "In the sea. Thank you.", "", "def f(): pass"]
    columns: dict[str, Any] = {
        "require": [[["forest"]], [["forest"]], [["forest"]], None],
        "reject": [["sea"], ["sea"], [], None],
        "test": ["", "", "", "assert f() is None"],
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    expected = [*(taste(answer, row) for answer, row in zip(answers[:3], rows, strict=False)), None]
    messages = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert hidden_taste(messages, **columns, kind=["question"] * 4) == expected
    assert len(set(expected)) == 4
    told = [[{"role": "user", "content": "Say where it lives."}]] * 4
    assert hidden_taste(messages, **columns, prompts=told)[1] == taste(answers[1], {**rows[1], "prompt": told[1]})
    assert hidden_taste(messages, **columns, prompts=told)[1] < expected[1], "an order wants no thanks"
    assert hidden_taste(answers[:1]) == [taste(answers[0], {})], "without grading, manner alone counts"
