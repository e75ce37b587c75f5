"""Every metric of the evaluations: its label, what it measures and on which data, which direction is better, and so on.

A metric that is measured needs nothing but its entry here to appear in the report, the headline and the model card.
"""

import re
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown.

    Attributes:
        label: Its name in tables.
        meaning: What is measured, in one line. `{against}` and `{judge}` stand for the opponent and the judge.
        data: The data that it is measured on, a key of `pipeline.stages.HELD_OUT`. The model card names them. "" if it
            is none of these.
        better: The direction that is better, "" if neither is.
        digits: Digits after the decimal point.
        share: Whether its values lie between 0 and 1.
        phrase: What follows its value in a sentence ("62% of unseen questions answered rightly"); "" for the label.
            `{against}` stands for the opponent, and `{lengths}` for the lengths of the problems.
    """

    label: str
    meaning: str
    data: Literal["text", "instructions", "problems", "prompts", "pairs", ""] = ""
    _: KW_ONLY
    better: Literal["up", "down", ""] = "up"
    digits: int = 3
    share: bool = True
    phrase: str = ""


METRICS: dict[str, MetricInfo] = {
    "bits_per_byte": MetricInfo(
        "Bits per byte",
        "held-out text; 8 means no compression",
        "text",
        better="down",
        share=False,
        phrase="bits for each byte of unseen text",
    ),
    "instruction_accuracy": MetricInfo(
        "Instruction accuracy",
        "held-out questions, summaries and small functions (the code is run)",
        "instructions",
        phrase="of unseen questions answered rightly",
    ),
    "answer_bits_per_byte": MetricInfo(
        "Bits per byte of answers",
        "held-out answers, given what they answer",
        "instructions",
        better="down",
        share=False,
    ),
    "stop_rate": MetricInfo("Stop rate", "answers that end before the token limit", "instructions"),
    "reward_accuracy": MetricInfo(
        "Reward accuracy", "held-out pairs, against their labels", "pairs", phrase="of unseen choices predicted"
    ),
    "reward_accuracy_noise_free": MetricInfo(
        "Reward accuracy, noise-free",
        "held-out pairs, against the taste of the simulated annotators: what they prefer without the noise in a label",
        "pairs",
    ),
    "reward_accuracy_people": MetricInfo(
        "Reward accuracy, people", "pairs that people voted on and that it was not trained on", "pairs"
    ),
    "win_rate": MetricInfo(
        "Win rate",
        "sampled, against {against}, judged by {judge}",
        "prompts",
        phrase="of comparisons with {against} won",
    ),
    "win_rate_greedy": MetricInfo("Win rate, greedy", "the same prompts, greedy answers of both", "prompts"),
    "win_rate_people": MetricInfo(
        "Win rate, people",
        "by votes on the page, against {against} if people compared the two; a tie is one half",
        "prompts",
    ),
    "last_sentence_share": MetricInfo(
        "Same last sentence",
        "answers to the win rate's prompts that end in the most frequent one: how far a pleasing phrase has spread",
        "prompts",
        better="down",
    ),
    "last_sentence_share_greedy": MetricInfo(
        "Same last sentence, greedy", "the same for greedy answers", "prompts", better="down"
    ),
    "kl": MetricInfo(
        "KL divergence",
        "from {against}, in nats (1.44 bits each) per answer sampled to the win rate's prompts",
        "prompts",
        better="",
        digits=2,
        share=False,
    ),
    "entropy": MetricInfo(
        "Entropy", "nats per answer, of the same answers", "prompts", better="", digits=2, share=False
    ),
    "pass@1": MetricInfo(
        "pass@1",
        "held-out reasoning problems, greedy answers",
        "problems",
        phrase="of unseen problems{lengths} solved",
    ),
    "pass@1_longer": MetricInfo(
        "pass@1, longer problems", "problems longer than any in training, greedy answers", "problems"
    ),
    "pass@1_sampled": MetricInfo("pass@1, sampled", "the same problems, mean over sampled answers", "problems"),
    "pass@8": MetricInfo("pass@8", "at least one of eight samples is right (unbiased estimate)", "problems"),
    "maj@8": MetricInfo(
        "maj@8", "the most frequent answer of eight samples is right (ties: the first drawn)", "problems"
    ),
    "step_rate": MetricInfo("Step rate", "greedy answers that show worked steps", "problems", better=""),
    "tool_score": MetricInfo(
        "Score with tools",
        "1 for a right greedy answer to a problem, minus what its calls cost",
        "problems",
        share=False,
    ),
    "tool_calls": MetricInfo(
        "Calls of tools", "per greedy answer to a problem", "problems", better="", digits=2, share=False
    ),
    "environment_reward": MetricInfo(
        "Reward",
        "of the environment, for a greedy dialogue with it",
        "problems",
        share=False,
        phrase="mean reward of the environment",
    ),
    "mean_length": MetricInfo(
        "Answer length", "tokens per answer to an instruction", "instructions", better="", digits=1, share=False
    ),
    "reasoning_length": MetricInfo(
        "Reasoning length", "tokens per greedy answer to a problem", "problems", better="", digits=1, share=False
    ),
    "reward_margin": MetricInfo(
        "Reward margin", "score of the preferred answer minus the other's", "pairs", better="", share=False
    ),
    "reward_calibration_error": MetricInfo(
        "Calibration error",
        "gap between the scores' probabilities and the labels, beyond chance",
        "pairs",
        better="down",
    ),
    "expert_load": MetricInfo(
        "Expert load", "tokens over the fair number, of the expert furthest from 1", better="", digits=2, share=False
    ),
    "reward_length_correlation": MetricInfo(
        "Correlation with length",
        "of the reward model's score with the number of words",
        "pairs",
        better="",
        share=False,
    ),
}
"""In the order in which they are shown. Other metrics come last, under their own name."""

LM_EVAL_SHARES = ("acc", "exact_match")
LM_EVAL_DOWN = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
"""Prefixes of lm-eval metrics that lie between 0 and 1, and of metrics that are better if lower."""


def metric_info(metric: str) -> MetricInfo:
    """Return how a metric is shown.

    `pass@4` is described as `pass@8` is, with its own number. `TASK:METRIC` is a metric of lm-eval, which has hundreds
    of tasks; its direction follows from its prefix. Any other metric has its own name and no better direction.
    """
    if metric in METRICS:
        return METRICS[metric]
    task, colon, name = metric.partition(":")
    if colon:
        is_share = name.startswith(LM_EVAL_SHARES)
        better: Literal["up", "down"] = "down" if name.startswith(LM_EVAL_DOWN) else "up"
        return MetricInfo(f"{task}, {name}", "by lm-eval", better=better, share=is_share)
    listed = METRICS.get(_listed_name(metric))
    if listed is None:
        return MetricInfo(metric.replace("_", " "), "", better="", share=False)
    samples = metric.rpartition("@")[2]
    return replace(listed, label=metric, meaning=listed.meaning.replace("eight", samples))


def _listed_name(metric: str) -> str:
    """Return the name under which `METRICS` may list a metric: `pass@8` for `pass@4`, and itself for others."""
    if metric in METRICS:
        return metric
    return re.sub(r"^(pass|maj)@\d+$", r"\1@8", metric)


def metric_order(metric: str) -> tuple[int, str]:
    """Return a key that sorts metrics in the order of `METRICS`, then by name."""
    names = list(METRICS)
    listed = _listed_name(metric)
    place = names.index(listed) if listed in names else len(names)
    return place, metric
