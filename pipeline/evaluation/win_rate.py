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
from pipeline.evaluation.metrics import NUMBER, Metric, single_answers, summarise
from pipeline.evaluation.parts import Rows
from pipeline.evaluation.results import StageResult
from pipeline.files import hash_file
from pipeline.preferences.judges import Judge
from pipeline.tools.chat_model import ChatModel

Answers = Sequence[Sequence[str]]
"""For each prompt, one or several answers."""
Matches = dict[str, tuple[Answers, Answers]]
"""`win_rate` (sampled answers) and `win_rate_greedy` -> the answers of a model, and the answers of its opponent."""
SAMPLES = 4
"""Number of answers that are sampled to each prompt. Compared with one answer, four halve the standard error."""
FILES = ("*config.json", "*token*.json", "tokenizer.model", "vocab.*", "merges.txt", "*.jinja", "*.safetensors")
"""Files of a model that its answers depend on, unlike training records in the same folder."""


def win_rate(predictions: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """The mean outcome of matches: 1 for a win, 0 for a loss, 0.5 for a tie."""
    return summarise(predictions, seed)


def last_sentence_share(predictions: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """The share of answers that end in their most frequent last sentence: 1 if all end in the same one."""
    sentences = [last_sentence(answer) for answer in predictions]
    ((most_frequent, _),) = Counter(sentences).most_common(1)
    return summarise((sentence == most_frequent for sentence in sentences), seed)


def last_sentence(answer: str) -> str:
    """Return the last sentence of an answer, "have a nice day" of "It is red. Have a nice day!"."""
    return re.split(r"[.!?]\s+", answer.strip())[-1].rstrip(".!?").casefold()


class WinRate(Metric):
    columns = Features(predictions=NUMBER)
    measure = staticmethod(win_rate)


class LastSentenceShare(Metric):
    measure = staticmethod(last_sentence_share)


def answer_both(
    chat: ChatModel, opponent: ChatModel | Mapping[str, Answers], rows: Rows, seed: int = 0, samples: int = SAMPLES
) -> Matches:
    """Let two models answer prompts, `samples` times at temperature 1 and once greedily.

    Args:
        chat: The model that is measured.
        opponent: Its opponent, or answers that the opponent has given earlier, by metric. The opponent samples with
            another seed, so that a model does not always tie with itself.
        rows: The prompts.
        seed: Seed of the evaluation.
        samples: Number of answers that each model samples to a prompt.
    """

    def answer(model: ChatModel, **options: Any) -> Answers:
        completions = model.sample([row["prompt"] for row in rows], **options)
        return [[completion.text for completion in of_prompt] for of_prompt in completions]

    sampling: dict[str, Any] = {"temperature": 1.0, "samples": samples}
    ours = answer(chat, seed=2 * seed, **sampling)
    our_greedy = answer(chat)
    if isinstance(opponent, Mapping):
        theirs = opponent["win_rate"]
        their_greedy = opponent["win_rate_greedy"]
    else:
        theirs = answer(opponent, seed=2 * seed + 1, **sampling)
        their_greedy = our_greedy
        if opponent is not chat:
            their_greedy = answer(opponent)
    return {"win_rate": (ours, theirs), "win_rate_greedy": (our_greedy, their_greedy)}


def measure_matches(result: StageResult, matches: Matches, rows: Rows, judge: Judge) -> None:
    """Record `win_rate` and `win_rate_greedy` and, for each, the share of our answers with the same last sentence."""
    for name, (ours, theirs) in matches.items():
        record_wins(result, name, ours, theirs, rows, judge)
        ends = last_sentence_share([answers[0] for answers in ours])
        result.record(name.replace("win_rate", "last_sentence_share"), ends, rows, by_kind=False)


def measure_distance(result: StageResult, chat: ChatModel, reference: ChatModel, rows: Rows) -> None:
    """Record `kl` and `entropy`, in nats per answer, estimated from one sampled answer to each prompt.

    `kl` is the mean of log p(answer) - log p_reference(answer), and `entropy` the mean of -log p(answer). Nothing is
    recorded if the two tokenizers have different tokens.
    """
    if chat.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        return
    prompts = chat.encode([row["prompt"] for row in rows])
    # The large seed makes these differ from the samples of the win rate.
    sampled = chat.complete(prompts, chat.max_new_tokens, temperature=1.0, seed=result.seed + 1_000_000)
    sequences = []
    for prompt, answer in zip(prompts, single_answers(sampled), strict=True):
        sequences.append(([*prompt, *answer.tokens], len(prompt)))
    # -log p(answer) under both models.
    losses = []
    for model in (chat.model, reference.model):
        # The weights remain rounded as for sampling; only the arithmetic becomes exact.
        dtype = model.dtype
        losses.append(sequence_losses(model.float(), chat.tokenizer, sequences))
        model.to(dtype)
    ours, theirs = losses
    ratios = [their_loss - our_loss for our_loss, their_loss in zip(ours, theirs, strict=True)]
    result.record("kl", ratios, rows, how=intervals.mean)
    result.record("entropy", ours, rows, how=intervals.mean)


def record_wins(result: StageResult, name: str, ours: Answers, theirs: Answers, rows: Rows, judge: Judge) -> None:
    """Record under `name` how often the answers `ours` win against the answers `theirs`.

    The n-th answer of a model to a prompt is matched with the n-th answer of its opponent, and the outcome of a prompt
    is the mean over its matches. Matches that the judge has no opinion on are left out, and so are prompts without any
    other match.
    """
    # The place of the prompt of each match.
    places: list[int] = []
    for place, answers in enumerate(ours):
        places += [place] * len(answers)
    outcomes = judge.match(list(chain(*ours)), list(chain(*theirs)), [rows[place] for place in places])
    outcomes_of_prompt: dict[int, list[float]] = defaultdict(list)
    for place, outcome in zip(places, outcomes, strict=True):
        # People may not have voted on a match yet.
        if outcome is not None:
            outcomes_of_prompt[place].append(outcome)
    missing = sum(outcome is None for outcome in outcomes)
    if missing:
        result.left_out.append(f"{name}: {missing} of {len(outcomes)} matches have not been judged")
    if not outcomes_of_prompt:
        return
    extras = []
    for place in outcomes_of_prompt:
        extra: dict[str, Any] = {"answer": ours[place][0], "opponent": theirs[place][0]}
        # All answers of the opponent are kept for later evaluations.
        if len(ours[place]) > 1:
            extra |= {"answers": ours[place], "opponents": theirs[place]}
        extras.append(extra)
    wins = win_rate(list(map(fmean, outcomes_of_prompt.values())), result.seed)
    result.record(name, wins, [rows[place] for place in outcomes_of_prompt], extras=extras)


def fingerprint(model: Path, rows: Rows, **settings: object) -> str:
    """Return a hash of everything that determines a model's answers to `rows` on one machine.

    It is "", which stands for unknown, for an adapter, whose base model may change elsewhere, and for a model that is
    not on this disk.

    Args:
        model: Folder of the model.
        rows: The prompts.
        **settings: Settings with which it answers.
    """
    if (model / "adapter_config.json").exists() or not model.is_dir():
        return ""
    # Different releases, numbers of threads or kernels may sample other answers from the same weights.
    software = [torch.__version__, transformers.__version__, torch.get_num_threads()]
    digest = hashlib.sha256(json.dumps([software, settings, rows], sort_keys=True, default=str).encode())
    files: set[Path] = set()
    for pattern in FILES:
        files.update(model.glob(pattern))
    for path in sorted(files):
        digest.update(path.name.encode() + bytes.fromhex(hash_file(path)))
    return digest.hexdigest()
