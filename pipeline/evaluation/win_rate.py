"""The metrics of preference: two models answer the same prompts, and a judge decides which answers are better."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from datasets import Features

from pipeline.evaluation import intervals
from pipeline.evaluation.likelihood import sequence_losses
from pipeline.evaluation.metrics import NUMBER, Metric, summarise
from pipeline.evaluation.parts import Rows
from pipeline.evaluation.results import StageResult
from pipeline.files import hash_file
from pipeline.preferences.judges import Judge
from pipeline.tools.chat_model import ChatModel

Answers = Sequence[Sequence[str]]
"""One or several answers to each prompt."""
Matches = dict[str, tuple[Answers, Answers]]
"""`win_rate` (sampled) and `win_rate_greedy` -> the answers by a model and by its opponent."""
SAMPLES = 4
"""Number of answers sampled to each prompt, in half a second. Four halve the standard error of one."""
FILES = ("*config.json", "*token*.json", "tokenizer.model", "vocab.*", "merges.txt", "*.jinja", "*.safetensors")
"""Files of a model that its answers depend on, unlike training records in the same folder."""


def win_rate(predictions: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """The mean outcome of matches: 1 for a win, 0 for a loss, 0.5 for a tie."""
    return summarise(predictions, seed)


def last_sentence_share(predictions: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """The share of answers that end in their most frequent last sentence: 1 if all end in the same one."""
    # "It is red. Have a nice day!" ends in "have a nice day".
    last = [re.split(r"[.!?]\s+", answer.strip())[-1].rstrip(".!?").casefold() for answer in predictions]
    ((most, _),) = Counter(last).most_common(1)
    return summarise((sentence == most for sentence in last), seed)


class WinRate(Metric):
    columns = Features(predictions=NUMBER)
    measure = staticmethod(win_rate)


class LastSentenceShare(Metric):
    measure = staticmethod(last_sentence_share)


def answer_both(
    chat: ChatModel, opponent: ChatModel | Mapping[str, Answers], rows: Rows, seed: int = 0, samples: int = SAMPLES
) -> Matches:
    """Let both models answer the prompts, `samples` times at temperature 1 and once greedily.

    The opponent samples with a different seed, so that a model does not always tie with itself.
    """

    def answer(model: ChatModel, **options: Any) -> Answers:
        completions = model.sample([row["prompt"] for row in rows], **options)
        return [[completion.text for completion in of_prompt] for of_prompt in completions]

    sampled: dict[str, Any] = {"temperature": 1.0, "samples": samples}
    ours, greedy = answer(chat, seed=2 * seed, **sampled), answer(chat)
    if isinstance(opponent, Mapping):
        return {"win_rate": (ours, opponent["win_rate"]), "win_rate_greedy": (greedy, opponent["win_rate_greedy"])}
    theirs = answer(opponent, seed=2 * seed + 1, **sampled)
    return {"win_rate": (ours, theirs), "win_rate_greedy": (greedy, greedy if opponent is chat else answer(opponent))}


def measure_matches(result: StageResult, matches: Matches, rows: Rows, judge: Judge) -> None:
    """Record `win_rate` and `win_rate_greedy` and, for each, the share of our answers with the same last sentence."""
    for name, (ours, theirs) in matches.items():
        record_wins(result, name, ours, theirs, rows, judge)
        ends = last_sentence_share([first for first, *_ in ours])
        result.record(name.replace("win_rate", "last_sentence_share"), ends, rows, by_kind=False)


def measure_distance(result: StageResult, chat: ChatModel, reference: ChatModel, rows: Rows) -> None:
    """Record `kl` and `entropy`, in nats per answer, of one sampled answer to each prompt.

    The means of log p(answer) - log p_reference(answer) and of -log p(answer); none if the reference has other tokens.
    """
    if chat.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        return
    prompts = chat.encode([row["prompt"] for row in rows])
    # The large seed makes these differ from the samples of the win rate.
    sampled = chat.complete(prompts, chat.max_new_tokens, temperature=1.0, seed=result.seed + 1_000_000)
    sequences = [([*prompt, *answer.tokens], len(prompt)) for prompt, (answer,) in zip(prompts, sampled, strict=True)]
    losses = []
    for model in (chat.model, reference.model):
        # The weights remain rounded as for sampling; only the arithmetic becomes exact.
        dtype = model.dtype
        losses.append(sequence_losses(model.float(), chat.tokenizer, sequences))
        model.to(dtype)
    own, others = losses
    result.record("kl", [b - a for a, b in zip(own, others, strict=True)], rows, how=intervals.mean)
    result.record("entropy", own, rows, how=intervals.mean)


def record_wins(result: StageResult, name: str, ours: Answers, theirs: Answers, rows: Rows, judge: Judge) -> None:
    """Record under `name` how often `ours` win against `theirs`, in the matches that the judge has an opinion on.

    The outcome of a prompt is the mean of its matches: each answer against the opponent's with the same number.
    """
    numbers = [number for number, (some, _) in enumerate(zip(ours, theirs, strict=True)) for _ in some]
    outcomes = judge.match(list(chain(*ours)), list(chain(*theirs)), [rows[number] for number in numbers])
    of_prompt: dict[int, list[float]] = defaultdict(list)
    for number, outcome in zip(numbers, outcomes, strict=True):
        # People may not have voted on a match yet.
        if outcome is not None:
            of_prompt[number].append(outcome)
    if missing := sum(outcome is None for outcome in outcomes):
        result.left_out.append(f"{name}: {missing} of {len(outcomes)} matches have not been judged")
    if not of_prompt:
        return
    # Keep all answers of the opponent for later evaluations.
    extras: list[dict[str, Any]] = [
        {"answer": one[0], "opponent": other[0], **({"answers": one, "opponents": other} if len(one) > 1 else {})}
        for one, other in ((ours[number], theirs[number]) for number in of_prompt)
    ]
    wins = win_rate(list(map(fmean, of_prompt.values())), result.seed)
    result.record(name, wins, [rows[number] for number in of_prompt], extras=extras)


def fingerprint(model: Path, rows: Rows, **settings: object) -> str:
    """Return a hash of everything that determines this model's answers to `rows` on one machine, or ""."""
    # The base model of an adapter, or a model that is not on this disk, may change unnoticed.
    if (model / "adapter_config.json").exists() or not model.is_dir():
        return ""
    # Different releases, numbers of threads or kernels may sample other answers from the same weights.
    software = [torch.__version__, transformers.__version__, torch.get_num_threads()]
    digest = hashlib.sha256(json.dumps([software, settings, rows], sort_keys=True, default=str).encode())
    for path in sorted({path for pattern in FILES for path in model.glob(pattern)}):
        digest.update(path.name.encode() + bytes.fromhex(hash_file(path)))
    return digest.hexdigest()
