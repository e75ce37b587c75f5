"""Baselines: what the stage that others are compared with reaches by tricks, without further training.

`elicited/pass@1`: its greedy answers to the problems, begun with a text ("Working:") or after some solved problems.
`best_of_4/pass@1`, `best_of_4/win_rate`: of four sampled answers, the one that the reward model scores highest.
`constant/win_rate`, `constant/win_rate_greedy`: its answers with the same text added to each, against those without.
`majority/pass@1`: the most frequent answer to each kind of problem in the training split; no model is needed.
`untouched/environment_reward`: what environments give if nothing is called in them; see `metrics.record_rewards`.
"""

from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import NamedTuple

from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.metrics import record_greedy, single_answers
from pipeline.evaluation.parts import Rows, subsample
from pipeline.evaluation.results import StageResult
from pipeline.evaluation.reward_model import Rate
from pipeline.evaluation.win_rate import Answers, Matches, answer_both, record_wins
from pipeline.preferences.judges import ANNOTATORS, Judge
from pipeline.tools.chat_model import ChatModel

CONSTANTS = "recipes.worlds.pocket.remarks:CONSTANTS"
"""Name of the texts that are added to answers, such as "… That is all.". `…` is the answer."""


class Elicitation(NamedTuple):
    """A way of asking: its name, the text that the answer begins with, and messages of solved problems before it."""

    name: str
    beginning: str = ""
    shots: Sequence[dict[str, str]] = ()


def measure_reasoning(result: StageResult, chat: ChatModel, held_out: HeldOut, elicit: Sequence[str]) -> None:
    """Record `elicited`, asked in the way that works best on other problems, and `majority`.

    `elicit` are texts with which answers to problems may begin; without any, and without `shots` of the held-out data,
    `elicited` is not measured.
    """
    problems = held_out.problems
    grader = held_out.grader
    # What a prompt alone can achieve: the model may be able to solve problems, but not do it unasked.
    ways = [Elicitation(text, beginning=text) for text in elicit]
    ways += [Elicitation(f"{len(shots) // 2} solved problems", shots=shots) for shots in held_out.shots]
    if ways:
        way = ways[0]
        if len(ways) > 1:
            way = max(ways, key=lambda way: sum(grader(elicit_answers(chat, held_out.trials, way), held_out.trials)))
        record_greedy(result, "elicited/pass@1", elicit_answers(chat, problems, way), problems, grader)
        result.texts["elicited"] = {"text": way.name}
    # A model that has only memorised the answers in its training data reaches this.
    if held_out.majority:
        answers = [f"The answer is {held_out.majority.get(row['kind'], '')}." for row in problems]
        record_greedy(result, "majority/pass@1", answers, problems, grader)


def elicit_answers(chat: ChatModel, rows: Rows, way: Elicitation) -> list[str]:
    """Return the greedy answers to problems that are asked in a certain way.

    The text with which an answer begins belongs to it, and counts towards the length limit. Solved problems precede the
    last message of a prompt.
    """
    asking = []
    for row in rows:
        *earlier, problem = row["prompt"]
        asking.append({**row, "prompt": [*earlier, *way.shots, problem]})
    beginning = chat.tokenizer(way.beginning, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [completion.text for completion in single_answers(chat.answer(asking, beginning))]


def measure_constant(
    result: StageResult, chat: ChatModel, held_out: HeldOut, matches: Matches, judge: Judge = ANNOTATORS
) -> None:
    """Record `constant`: the model's answers with a text added to each, against those without.

    `matches` are the model's own answers to the prompts, twice.
    """
    # The text is chosen on different prompts than it is measured on: the best of twenty is partly best by chance.
    validation = subsample([row for row in held_out.validation if judge.can_judge(row)], judge.constants)
    if not validation:
        return
    prompts = [row for row in held_out.prompts if judge.can_judge(row)]
    result.texts["constant"] = {}
    trials = answer_both(chat, chat, validation, result.seed, samples=1)
    for metric, (ours, theirs) in matches.items():
        our_trials, their_trials = trials[metric]
        text = find_constant(_only_answers(our_trials), _only_answers(their_trials), validation, judge)
        with_text = []
        for answers in ours:
            with_text.append([text.replace("…", answer) for answer in answers])
        record_wins(result, f"constant/{metric}", with_text, theirs, prompts, judge)
        result.texts["constant"][metric.replace("win_rate", "text")] = text


def _only_answers(answered: Answers) -> list[str]:
    """Return the only answer to each prompt."""
    return [answer for (answer,) in answered]


def find_constant(ours: Sequence[str], theirs: Sequence[str], rows: Rows, judge: Judge = ANNOTATORS) -> str:
    """Return the text of `CONSTANTS` that wins most often against `theirs` when added to `ours`; the first of a tie."""
    constants: tuple[str, ...] = resolve_name(CONSTANTS)
    wins = [0.0] * len(constants)
    for answer, opponent, row in zip(ours, theirs, rows, strict=True):
        with_text = [text.replace("…", answer) for text in constants]
        outcomes = judge.match(with_text, [opponent] * len(with_text), [row] * len(with_text))
        wins = [won + (outcome or 0.0) for won, outcome in zip(wins, outcomes, strict=True)]
    return constants[wins.index(max(wins))]


def measure_best_of(
    result: StageResult,
    chats: Mapping[str, ChatModel],
    held_out: HeldOut,
    numbers: Sequence[int],
    rate: Rate,
    judge: Judge | None,
) -> None:
    """Record `best_of_N` for each of `numbers`: of the first N sampled answers, the one that `rate` scores highest.

    `result` is the reward model's. `chats` has the opponent, by the keys of the data that it answers: problems and, if
    there is a judge, prompts. For prompts, the chosen answers are compared with single answers of the opponent.
    """
    seed = 2 * result.seed
    problems = held_out.problems
    if problems and held_out.graded:
        for number, answers in _best_answers(chats["problems"], problems, numbers, rate, seed).items():
            record_greedy(result, f"best_of_{number}/pass@1", answers, problems, held_out.grader)
    prompts = []
    if judge:
        prompts = [row for row in held_out.prompts if judge.can_judge(row)]
    if judge and prompts:
        chat = chats["prompts"]
        # Another seed, so that the best does not compete with itself.
        single = single_answers(chat.sample([row["prompt"] for row in prompts], temperature=1.0, seed=seed + 1))
        theirs = [[completion.text] for completion in single]
        for number, answers in _best_answers(chat, prompts, numbers, rate, seed).items():
            ours = [[answer] for answer in answers]
            record_wins(result, f"best_of_{number}/win_rate", ours, theirs, prompts, judge)
    for number in numbers:
        result.texts[f"best_of_{number}"] = {"text": f"{number} answers"}


def _best_answers(chat: ChatModel, rows: Rows, numbers: Sequence[int], rate: Rate, seed: int) -> dict[int, list[str]]:
    """Return the best of the first N answers sampled to each prompt, for each N of `numbers`; the first of a tie.

    The best is the one that `rate` scores highest.
    """
    prompts = [row["prompt"] for row in rows]
    most = max(numbers)
    sampled = []
    conversations = []
    completions = chat.sample(prompts, samples=most, temperature=1.0, seed=seed)
    for prompt, of_prompt in zip(prompts, completions, strict=True):
        answers = [completion.text for completion in of_prompt]
        sampled.append(answers)
        conversations += [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]
    scores = rate(conversations)
    best: dict[int, list[str]] = {}
    for number in numbers:
        best[number] = []
        for index, answers in enumerate(sampled):
            scores_of_first = list(scores[index * most : index * most + number])
            best[number].append(answers[scores_of_first.index(max(scores_of_first))])
    return best
