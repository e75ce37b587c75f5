"""Every metric of the evaluations: its label, what it measures, which direction is better and how it is printed."""

import re
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown.

    `meaning` says in one line what is measured; `{against}` and `{judge}` stand for the opponent and the judge. Values
    lie between 0 and 1 if it is a `share`. Neither direction is better if `better` is "".
    """

    label: str
    meaning: str
    better: Literal["up", "down", ""] = "up"
    digits: int = 3
    share: bool = True


METRICS: dict[str, MetricInfo] = {
    "bits_per_byte": MetricInfo("Bits per byte", "held-out text; 8 means no compression", "down", share=False),
    "instruction_accuracy": MetricInfo(
        "Instruction accuracy", "held-out questions, summaries and small functions (the code is run)"
    ),
    "answer_bits_per_byte": MetricInfo(
        "Bits per byte of answers", "held-out answers, given what they answer", "down", share=False
    ),
    "stop_rate": MetricInfo("Stop rate", "answers that end before the token limit"),
    "reward_accuracy": MetricInfo("Reward accuracy", "held-out pairs, against their labels"),
    "reward_accuracy_noise_free": MetricInfo(
        "Reward accuracy, noise-free",
        "held-out pairs, against the taste of the simulated annotators: what they prefer without the noise in a label",
    ),
    "reward_accuracy_people": MetricInfo(
        "Reward accuracy, people", "pairs that people voted on and that it was not trained on"
    ),
    "win_rate": MetricInfo("Win rate", "sampled, against {against}, judged by {judge}"),
    "win_rate_greedy": MetricInfo("Win rate, greedy", "the same prompts, greedy answers of both"),
    "win_rate_people": MetricInfo(
        "Win rate, people", "by votes on the page, against {against} if people compared the two; a tie is one half"
    ),
    "last_sentence_share": MetricInfo(
        "Same last sentence",
        "answers to the win rate's prompts that end in the most frequent one: how far a pleasing phrase has spread",
        "down",
    ),
    "last_sentence_share_greedy": MetricInfo("Same last sentence, greedy", "the same for greedy answers", "down"),
    "kl": MetricInfo(
        "KL divergence",
        "from {against}, in nats (1.44 bits each) per answer sampled to the win rate's prompts",
        "",
        2,
        share=False,
    ),
    "entropy": MetricInfo("Entropy", "nats per answer, of the same answers", "", 2, share=False),
    "pass@1": MetricInfo("pass@1", "held-out reasoning problems, greedy answers"),
    "pass@1_longer": MetricInfo("pass@1, longer problems", "problems longer than any in training, greedy answers"),
    "pass@1_sampled": MetricInfo("pass@1, sampled", "the same problems, mean over sampled answers"),
    "pass@8": MetricInfo("pass@8", "at least one of eight samples is right (unbiased estimate)"),
    "maj@8": MetricInfo("maj@8", "the most frequent answer of eight samples is right (ties: the first drawn)"),
    "step_rate": MetricInfo("Step rate", "greedy answers that show worked steps", ""),
    "tool_score": MetricInfo(
        "Score with tools", "1 for a right greedy answer to a problem, minus what its calls cost", share=False
    ),
    "tool_calls": MetricInfo("Calls of tools", "per greedy answer to a problem", "", 2, share=False),
    "environment_reward": MetricInfo("Reward", "of the environment, for a greedy dialogue with it", share=False),
    "mean_length": MetricInfo("Answer length", "tokens per answer to an instruction", "", 1, share=False),
    "reasoning_length": MetricInfo("Reasoning length", "tokens per greedy answer to a problem", "", 1, share=False),
    "reward_margin": MetricInfo("Reward margin", "score of the preferred answer minus the other's", "", share=False),
    "reward_calibration_error": MetricInfo(
        "Calibration error", "gap between the scores' probabilities and the labels, beyond chance", "down"
    ),
    "expert_load": MetricInfo(
        "Expert load", "tokens over the fair number, of the expert furthest from 1", "", 2, share=False
    ),
    "reward_length_correlation": MetricInfo(
        "Correlation with length", "of the reward model's score with the number of words", "", share=False
    ),
}
"""In the order in which they are shown. Other metrics come last, under their own name."""

LM_EVAL_SHARES = ("acc", "exact_match")
LM_EVAL_DOWN = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
"""Prefixes of lm-eval metrics that lie between 0 and 1, and of metrics that are better if lower."""


def metric_info(metric: str) -> MetricInfo:
    """Return how a metric is shown. If it is not in `METRICS`, it has its own name and no better direction."""
    # `TASK:METRIC` is a metric of lm-eval, which has hundreds of tasks; the metrics are recognised by prefixes.
    task, colon, name = metric.partition(":")
    if colon:
        better: Literal["up", "down"] = "down" if name.startswith(LM_EVAL_DOWN) else "up"
        return MetricInfo(f"{task}, {name}", "by lm-eval", better, share=name.startswith(LM_EVAL_SHARES))
    info = METRICS.get(of_eight(metric)) or MetricInfo(metric.replace("_", " "), "", "", share=False)
    if metric in METRICS or of_eight(metric) == metric:
        return info
    # pass@4 is described as pass@8 is, with another number.
    return replace(info, label=metric, meaning=info.meaning.replace("eight", metric.rpartition("@")[2]))


def of_eight(metric: str) -> str:
    """Return the name of a metric, with eight as its number of samples if it has one: pass@8 for pass@4."""
    return metric if metric in METRICS else re.sub(r"^(pass|maj)@\d+$", r"\1@8", metric)


def metric_order(metric: str) -> tuple[int, str]:
    """Sort metrics in the order of `METRICS`, then by name."""
    names = list(METRICS)
    return names.index(of_eight(metric)) if of_eight(metric) in names else len(names), metric
