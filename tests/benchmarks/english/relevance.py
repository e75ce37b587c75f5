"""Stage 3 of `recipes/english`: PPO, DPO and best of n, judged by SmolLM2, which trained none of them.

    python -m tests.benchmarks.english.relevance runs/english

The judge is `recipes/worlds/english/judge.py`: by how many nats the turns before make a reply more probable. Everyone
replies to the same held-out turns. Models sample at temperature 1, and greedily; the best of n samples of `2_sft` is
the one that `3_reward` scores highest; "another's" is what a person replied in another conversation; "constant" is, of
the greedy replies of `2_sft` to other prompts, the one that the judge likes best as a reply to all of these.

What else a gain could be stands beside it: words, the share of words that are in the turns before, distinct replies,
and the share of the most frequent last sentence. Wins are against a sample of `2_sft`, ties count half; the last column
is the mean difference of nats from it. Intervals are 95%, by the bootstrap over prompts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from pipeline.data.overlap import words
from pipeline.evaluation.intervals import mean, outcome_mean
from pipeline.evaluation.win_rate import last_sentence_share
from pipeline.models.loading import load_model
from pipeline.preferences.judges import score
from recipes.worlds.english.judge import relevance
from tests.benchmarks.english.__main__ import shown
from tests.benchmarks.english.replies import load

BEST_OF = (4, 16)
CONSTANTS = 20
"""Replies among which the constant one is chosen, and prompts on which."""
Rows = Sequence[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--stages", nargs="+", default=["3_ppo", "3_dpo"], help="stages beside 2_sft")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--limit", type=int, default=200, help="number of prompts")
    args = parser.parse_args()
    rows, others = (
        pq.read_table(args.run / "data" / "preferences" / f"{split}.parquet").to_pylist()
        for split in (args.split, "validation" if args.split == "test" else "test")
    )
    rows = rows[: args.limit]
    replies = {"the person's": [row["reply"] for row in rows]}
    replies["another's"] = [row["reply"] for row in (*rows[1:], rows[0])]
    sft = load(args.run / "2_sft")
    samples = [[reply.text for reply in of_row] for of_row in sft.answer(rows, samples=max(BEST_OF), temperature=1.0)]
    # Another seed, so that the best of n is not compared with one of its n.
    opponent = [reply.text for (reply,) in sft.answer(rows, temperature=1.0, seed=1)]
    replies["constant"] = [find_constant(args.run, others[:CONSTANTS])] * len(rows)
    replies["2_sft"] = opponent
    replies["2_sft, greedy"] = [reply.text for (reply,) in sft.answer(rows)]
    for number in BEST_OF:
        replies[f"best of {number}"] = best_of(args.run / "3_reward", rows, [some[:number] for some in samples])
    for stage in args.stages:
        model = load(args.run / stage)
        replies[stage] = [reply.text for (reply,) in model.answer(rows, temperature=1.0)]
        replies[f"{stage}, greedy"] = [reply.text for (reply,) in model.answer(rows)]
    judged = {name: judge(rows, texts) for name, texts in replies.items()}
    print(
        f"{'':<16}{'words':>6}{'in turns':>9}{'distinct':>9}{'last':>6}{'reward':>8}{'nats':>7}"
        f"{'wins against 2_sft':>24}{'difference of nats':>24}"
    )
    for name, texts in replies.items():
        values = judged[name]
        pairs = list(zip(values, judged["2_sft"], strict=True))
        wins = outcome_mean([float(ours > theirs) + 0.5 * (ours == theirs) for ours, theirs in pairs])
        difference = mean([ours - theirs for ours, theirs in pairs])
        print(
            f"{name:<16}{fmean(len(words(text)) for text in texts):>6.1f}{share_in_turns(rows, texts):>9.3f}"
            f"{len(set(texts)) / len(texts):>9.3f}{last_sentence_share(texts)['value']:>6.2f}"
            f"{fmean(rate(args.run / '3_reward', rows, texts)):>8.2f}{fmean(values):>7.2f}"
            f"{shown(wins):>24}{shown(difference):>24}",
            flush=True,
        )


def judge(rows: Rows, texts: Sequence[str]) -> list[float]:
    """Return the judge's score of a reply to each row."""
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return relevance(completions, [row["prompt"] for row in rows])


def rate(folder: Path, rows: Rows, texts: Sequence[str]) -> list[float]:
    """Return the reward of a reply to each row."""
    model, tokenizer = load_model(str(folder), "RUN", reward=True)
    pairs = zip(rows, texts, strict=True)
    return score(model, tokenizer, [[*row["prompt"], {"role": "assistant", "content": text}] for row, text in pairs])


def best_of(folder: Path, rows: Rows, samples: Sequence[Sequence[str]]) -> list[str]:
    """Return, of the samples of each row, the one with the highest reward."""
    of_place = [rate(folder, rows, texts) for texts in zip(*samples, strict=True)]
    best = []
    for texts, rewards in zip(samples, zip(*of_place, strict=True), strict=True):
        best.append(texts[rewards.index(max(rewards))])
    return best


def find_constant(run: Path, rows: Rows) -> str:
    """Return the greedy reply to one of the rows that the judge likes best as a reply to all others."""
    candidates = sorted({reply.text for (reply,) in load(run / "2_sft").answer(rows)})
    return max(candidates, key=lambda text: fmean(judge(rows, [text] * len(rows))))


def share_in_turns(rows: Rows, texts: Sequence[str]) -> float:
    """Return the share of the words of replies that are in the turns before."""
    shares = []
    for row, text in zip(rows, texts, strict=True):
        before = {word for message in row["prompt"] for word in words(message["content"])}
        of_reply = words(text)
        if of_reply:
            shares.append(sum(word in before for word in of_reply) / len(of_reply))
    return fmean(shares)


if __name__ == "__main__":
    main()
