"""Baselines: what the opponent, with which other stages are compared, reaches by tricks without further training.

- `elicited/pass@1`: its greedy answers to problems, if they begin with a text ("Working:") or follow solved problems.
- `best_of_4/pass@1`, `best_of_4/win_rate`: of four sampled answers, the one that the reward model scores highest.
- `constant/win_rate`, `constant/win_rate_greedy`: its answers with the same text added to each, against the answers
  without the text.
- `majority/pass@1`: the most frequent answer to each kind of problem in the training split; no model is needed.
- `untouched/environment_reward`: what environments give if nothing is called in them; see `metrics.record_rewards`.
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
    """A way of asking a model to solve a problem.

    Attributes:
        name: What the report calls it.
        beginning: Text with which the answer begins, "" for none.
        shots: Messages of solved problems that precede the problem.
    """

    name: str
    beginning: str = ""
    shots: Sequence[dict[str, str]] = ()


def measure_reasoning(result: StageResult, chat: ChatModel, held_out: HeldOut, elicit: Sequence[str]) -> None:
    """Record `elicited/pass@1` and `majority/pass@1`.

    Of several ways of asking, the one that solves most of other problems (`held_out.trials`) is measured.

    Args:
        result: Where they are recorded.
        chat: The opponent.
        held_out: The problems, solved problems to show first (`shots`), and the most frequent answers (`majority`).
        elicit: Texts with which answers may begin. Without any, and without `shots`, `elicited` is not measured.
    """
    problems = held_out.problems
    grader = held_out.grader
    # What a prompt alone can achieve: the model may be able to solve problems, but not do it unasked.
    ways = [Elicitation(text, beginning=text) for text in elicit]
    ways += [Elicitation(f"{len(shots) // 2} solved problems", shots=shots) for shots in held_out.shots]

    def count_solved(way: Elicitation) -> int:
        return sum(grader(elicit_answers(chat, held_out.trials, way), held_out.trials))

    if ways:
        best_way = ways[0]
        if len(ways) > 1:
            best_way = max(ways, key=count_solved)
        record_greedy(result, "elicited/pass@1", elicit_answers(chat, problems, best_way), problems, grader)
        result.texts["elicited"] = {"text": best_way.name}
    # A model that has only memorised the answers in its training data reaches this.
    if held_out.majority:
        answers = [f"The answer is {held_out.majority.get(row['kind'], '')}." for row in problems]
        record_greedy(result, "majority/pass@1", answers, problems, grader)


def elicit_answers(chat: ChatModel, rows: Rows, way: Elicitation) -> list[str]:
    """Return the greedy answers to problems that are asked in a certain way.

    The text with which an answer begins belongs to the answer, and counts towards its length limit. Solved problems are
    inserted before the last message of a prompt.
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
    """Record `constant/win_rate` and `constant/win_rate_greedy`: answers with a text, against the same without it.

    Args:
        result: Where they are recorded.
        chat: The opponent.
        held_out: The prompts, and other prompts on which the text is chosen (`validation`).
        matches: The model's own answers to the prompts on both sides of each match; to one side, the text is added.
        judge: Who decides the matches.
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
    """Return the text of `CONSTANTS` that wins most often against `theirs` when it is added to `ours`.

    Of several texts that win equally often, the first is returned. `rows` are the prompts, with an answer each.
    """
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
    """Record `best_of_N/pass@1` and `best_of_N/win_rate`: of the first N sampled answers, the one with the best score.

    For prompts, the chosen answers are compared with single answers of the opponent.

    Args:
        result: The result of the reward model, where they are recorded.
        chats: The opponent, by the keys of the data that it answers: problems and, if there is a judge, prompts.
        held_out: The problems and prompts.
        numbers: The values of N.
        rate: Returns the scores of the reward model.
        judge: Who decides the win rates; None if nobody does, and then they are not measured.
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
    """Return, for each N of `numbers`, the best of the first N answers that are sampled to each prompt.

    The best is the answer that `rate` scores highest; of several with the same score, the first.
    """
    prompts = [row["prompt"] for row in rows]
    samples = max(numbers)
    sampled_answers: list[list[str]] = []
    conversations = []
    completions = chat.sample(prompts, samples=samples, temperature=1.0, seed=seed)
    for prompt, of_prompt in zip(prompts, completions, strict=True):
        answers = [completion.text for completion in of_prompt]
        sampled_answers.append(answers)
        conversations += [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]
    # Scores of all answers, `samples` for each prompt.
    scores = rate(conversations)
    best: dict[int, list[str]] = {}
    for number in numbers:
        best[number] = []
        for index, answers in enumerate(sampled_answers):
            begin = index * samples
            scores_of_first = list(scores[begin : begin + number])
            best_place = scores_of_first.index(max(scores_of_first))
            best[number].append(answers[best_place])
    return best
