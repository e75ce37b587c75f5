"""Baselines: what the stage that others are compared with reaches by tricks, without further training.

`elicited/pass@1`: its greedy answers to the problems, begun with a text ("Working:") or after some solved problems.
`best_of_4/pass@1`, `best_of_4/win_rate`: of four sampled answers, the one that the reward model scores highest.
`constant/win_rate`, `constant/win_rate_greedy`: its answers with the same text added to each, against those without.
`majority/pass@1`: the most frequent answer to each kind of problem in the training split; no model is needed.
`untouched/environment_reward`: what environments give if nothing is called in them; see `metrics.record_rewards`.
"""

from collections.abc import Mapping, Sequence
from pkgutil import resolve_name

from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.metrics import record_greedy
from pipeline.evaluation.parts import Rows, subsample
from pipeline.evaluation.results import StageResult
from pipeline.evaluation.reward_model import Rate
from pipeline.evaluation.win_rate import Matches, answer_both, record_wins
from pipeline.preferences.judges import ANNOTATORS, Judge
from pipeline.tools.chat_model import ChatModel

CONSTANTS = "recipes.worlds.pocket.remarks:CONSTANTS"
"""Name of the texts that are added to answers, such as "… That is all.". `…` is the answer."""


def measure_reasoning(result: StageResult, chat: ChatModel, held_out: HeldOut, elicit: Sequence[str]) -> None:
    """Record `elicited`, asked in the way that works best on other problems, and `majority`."""
    grader = held_out.grader
    # What a prompt alone can achieve: the model may be able to solve problems, but not do it unasked. Each way of
    # asking has a name, the beginning of the answer, and the examples before the problem.
    ways: list[tuple[str, str, list[dict[str, str]]]] = [(text, text, []) for text in elicit]
    ways += [(f"{len(shots) // 2} solved problems", "", shots) for shots in held_out.shots]
    if len(ways) > 1:
        trials = held_out.trials
        ways = [max(ways, key=lambda way: sum(grader(answer_begun(chat, trials, *way[1:]), trials)))]
    for name, begun, shots in ways:
        answers = answer_begun(chat, held_out.problems, begun, shots)
        record_greedy(result, "elicited/pass@1", answers, held_out.problems, grader)
        result.texts["elicited"] = {"text": name}
    # A model that has only memorised the answers in its training data reaches this.
    if held_out.majority:
        answers = [f"The answer is {held_out.majority.get(row['kind'], '')}." for row in held_out.problems]
        record_greedy(result, "majority/pass@1", answers, held_out.problems, grader)


def measure_constant(
    result: StageResult, chat: ChatModel, held_out: HeldOut, matches: Matches, judge: Judge = ANNOTATORS
) -> None:
    """Record `constant`: what pleases the judge whatever was asked. `matches` are the model's own answers, twice."""
    # The text is chosen on different prompts than it is measured on: the best of twenty is partly best by chance.
    validation = subsample([row for row in held_out.validation if judge.can_judge(row)], judge.constants)
    if not validation:
        return
    prompts = [row for row in held_out.prompts if judge.can_judge(row)]
    result.texts["constant"] = {}
    tried = answer_both(chat, chat, validation, result.seed, samples=1)
    for metric, (ours, theirs) in matches.items():
        own, others = ([answer for (answer,) in side] for side in tried[metric])
        best = find_constant(own, others, validation, judge)
        glued = [[best.replace("…", answer) for answer in answers] for answers in ours]
        record_wins(result, f"constant/{metric}", glued, theirs, prompts, judge)
        result.texts["constant"][metric.replace("win_rate", "text")] = best


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

    def best(key: str, rows: Rows) -> dict[int, list[str]]:
        prompts, most = [row["prompt"] for row in rows], max(numbers)
        sampled = chats[key].sample(prompts, samples=most, temperature=1.0, seed=2 * result.seed)
        answered = [(prompt, answer.text) for prompt, some in zip(prompts, sampled, strict=True) for answer in some]
        scores = rate([[*prompt, {"role": "assistant", "content": text}] for prompt, text in answered])
        starts = range(0, len(scores), most)
        return {
            number: [answered[max(range(at, at + number), key=scores.__getitem__)][1] for at in starts]
            for number in numbers
        }

    if (problems := held_out.problems) and held_out.graded:
        for number, answers in best("problems", problems).items():
            record_greedy(result, f"best_of_{number}/pass@1", answers, problems, held_out.grader)
    if judge and (prompts := [row for row in held_out.prompts if judge.can_judge(row)]):
        single = chats["prompts"].sample([row["prompt"] for row in prompts], temperature=1.0, seed=2 * result.seed + 1)
        theirs = [[answer.text] for (answer,) in single]
        for number, answers in best("prompts", prompts).items():
            record_wins(result, f"best_of_{number}/win_rate", [[text] for text in answers], theirs, prompts, judge)
    result.texts |= {f"best_of_{number}": {"text": f"{number} answers"} for number in numbers}


def answer_begun(chat: ChatModel, rows: Rows, prefix: str, before: Sequence[dict[str, str]] = ()) -> list[str]:
    """Return the greedy answers that begin with `prefix`. The messages `before` precede the last one of each prompt."""
    asked = [{**row, "prompt": [*row["prompt"][:-1], *before, row["prompt"][-1]]} for row in rows]
    begun = chat.tokenizer(prefix, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [completion.text for (completion,) in chat.answer(asked, begun)]


def find_constant(ours: Sequence[str], theirs: Sequence[str], rows: Rows, judge: Judge = ANNOTATORS) -> str:
    """Return the text of `CONSTANTS` that wins most often against `theirs` when added to `ours`; the first of a tie."""
    constants: tuple[str, ...] = resolve_name(CONSTANTS)
    wins = [0.0] * len(constants)
    for answer, other, row in zip(ours, theirs, rows, strict=True):
        glued = [text.replace("…", answer) for text in constants]
        outcomes = judge.match(glued, [other] * len(glued), [row] * len(glued))
        wins = [won + (outcome or 0.0) for won, outcome in zip(wins, outcomes, strict=True)]
    return constants[wins.index(max(wins))]
