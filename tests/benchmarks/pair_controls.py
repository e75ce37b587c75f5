"""How much of what a reward model knows can be seen without reading the question?

    python -m tests.benchmarks.pair_controls runs/smollm2/3_preferences --models runs/smollm2/3_reward \
        --also runs/smollm2/data/preference/train.parquet

Says how many test pairs are told apart by the length of the answer, by its number of steps, by the share of its words
that are in the prompt, and by a linear model of its character n-grams, fitted on the training pairs (and on those of
`--also`) as reward models are, with several lengths and decays of weights (the accuracy on the validation pairs says
which to choose); by the likelihood of answers under a language model (`--policy`), and by what the prompt adds to it;
and by reward models. Intervals are over prompts.
"""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.overlap import words
from pipeline.data.sources import open_source
from pipeline.evaluation.reward_model import RewardAccuracy
from pipeline.models.loading import load_model
from pipeline.preferences.judges import score

Pairs = Sequence[dict[str, Any]]
SIDES = ("chosen", "rejected")
LONGEST = (3, 4, 5, 6)
DECAYS = (1e-4, 1e-3, 1e-2)
BUCKETS = 2**16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="what 3_preferences wrote")
    parser.add_argument("--models", nargs="*", default=[], help="reward models")
    parser.add_argument("--also", nargs="*", default=[], help="other training pairs of these models")
    parser.add_argument("--policy", help="the model that answered")
    args = parser.parse_args()
    splits = {name: list(rows) for name, rows in open_source(args.pairs, None).items()}
    for path in args.also:
        splits["train"] += open_source(path, None)["train"]
    print(", ".join(f"{len(rows):,} pairs in {name}" for name, rows in splits.items()))
    test = splits["test"]
    show("longer answer", [[len(answer(row, side)) for side in SIDES] for row in test], test)
    show("more steps", [[len(re.findall(r"[.\n](?:\s|$)", answer(row, side))) for side in SIDES] for row in test], test)
    show("words of the prompt", [[words_of_prompt(row, side) for side in SIDES] for row in test], test)
    for longest in LONGEST:
        train, *others = (differences(splits[name], longest) for name in ("train", "validation", "test"))
        products = [other @ train.T for other in (train, *others)]
        for decay in DECAYS:
            weights = fit(products[0], decay)
            held, tested = (product @ weights for product in products[1:])
            name = f"n-grams to {longest}, decay {decay:g}, validation {(held > 0).float().mean():.3f}"
            show(name, [[margin, 0.0] for margin in tested.tolist()], test)
    if args.policy:
        given, total, alone = likelihoods(args.policy, test)
        show(f"likelihood under {args.policy}", given.tolist(), test)
        show("what the prompt adds to it", (total - alone).tolist(), test)
    for path in args.models:
        show(path, rate(path, test), test)


def answer(row: dict[str, Any], side: str) -> str:
    """Return the text of an answer."""
    return str(row[side][-1]["content"])


def show(name: str, scores: Sequence[Sequence[float]], pairs: Pairs) -> None:
    """Print the share of pairs that scores tell apart, of all and of each kind."""
    parts = {"all": list(range(len(pairs)))}
    for index, row in enumerate(pairs):
        parts.setdefault(row["kind"], []).append(index)
    texts = []
    for part, chosen in parts.items():
        both = np.array([scores[i] for i in chosen], dtype=float)
        units = [json.dumps(pairs[i]["prompt"]) for i in chosen]
        found = RewardAccuracy().compute(predictions=both[:, 0], references=both[:, 1], units=units)
        low, high = found["ci95"]
        texts.append(f"{part} {found['value']:.3f} ({low:.3f} to {high:.3f}, n = {len(chosen)})")
    print(f"{name}: {', '.join(texts)}", flush=True)


def words_of_prompt(row: dict[str, Any], side: str) -> float:
    """Return the share of the words of an answer that are in the prompt."""
    prompt = {word for message in row["prompt"] for word in words(message["content"])}
    of_answer = words(answer(row, side))
    return sum(word in prompt for word in of_answer) / max(1, len(of_answer))


def differences(pairs: Pairs, longest: int) -> torch.Tensor:
    """Return (pairs, buckets): hashed n-grams of preferred answers minus those of the others."""
    found = torch.zeros(len(pairs), BUCKETS)
    for row, pair in zip(found, pairs, strict=True):
        for side, sign in zip(SIDES, (1, -1), strict=True):
            text = f"^{answer(pair, side)}$"
            grams = {text[at : at + n] for n in range(1, longest + 1) for at in range(len(text) - n + 1)}
            for gram in grams:
                row[int.from_bytes(gram.encode(), "big") % 2_147_483_629 % BUCKETS] += sign
    return found


def fit(products: torch.Tensor, decay: float) -> torch.Tensor:
    """Return the weights of training pairs in the Bradley-Terry model with an L2 penalty, by their inner products."""
    weights = torch.zeros(len(products), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        margins = products @ weights
        value = torch.nn.functional.softplus(-margins).mean() + decay * weights @ margins
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


@torch.inference_mode()
def likelihoods(path: str, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log-probabilities of each answer, its end included, each of shape (pairs, 2).

    They are the mean of its tokens, their sum, and their sum if an empty turn is in place of the prompt.
    """
    model, tokenizer = load_model(path, "--policy", dtype=torch.float32)
    nothing = [{"role": "user", "content": ""}]
    means, sums, alone = [], [], []
    for row, side in ((row, side) for row in pairs for side in SIDES):
        for prompt in (row["prompt"], nothing):
            start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
            ids = torch.tensor([tokenizer.apply_chat_template([*prompt, *row[side]], return_dict=False)])
            logps = model.eval()(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])
            if prompt is nothing:
                alone.append(logps.sum().item())
            else:
                means.append(logps.mean().item())
                sums.append(logps.sum().item())
    return np.reshape(means, (-1, 2)), np.reshape(sums, (-1, 2)), np.reshape(alone, (-1, 2))


def rate(path: str, pairs: Pairs) -> list[list[float]]:
    """Return the scores of a reward model for both answers of each pair."""
    model, tokenizer = load_model(path, "--models", reward=True, dtype=torch.float32)
    texts = [[*row["prompt"], *row[side]] for row in pairs for side in SIDES]
    return np.reshape(score(model.eval(), tokenizer, texts), (-1, 2)).tolist()


if __name__ == "__main__":
    main()
