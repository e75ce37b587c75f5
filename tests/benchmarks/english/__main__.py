"""Stage 1 of `recipes/english` beside compressors and n-grams, on the test split.

    pip install pyppmd
    fourstage run english
    accelerate launch -m recipes.pretrain --config recipes/english/1_pretrain.yaml --max_steps 532 \\
        --output_dir runs/english/1_pretrain_quarter
    python -m tests.benchmarks.english runs/english --quarter runs/english/1_pretrain_quarter

Bits per byte of each source and of all together. The model begins each document anew, and reads no more than 256 tokens
of it before a token. The compressors read the documents of a source one after the other, with a line break after each,
which is counted among the bytes; "after training" means that they read the training text first. The n-grams are of the
tokens of the model, counted in the same training text. Intervals are 95%, by the bootstrap over documents.

Then minimal pairs, see minimal_pairs.py, made from the sentences of the Brown corpus and of the conversations.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.intervals import Estimate, ratio
from pipeline.evaluation.likelihood import document_losses
from tests.benchmarks.english import compressors, minimal_pairs
from tests.benchmarks.english.ngrams import KneserNey

CONTEXT = 256
PAIRS = 500
"""Minimal pairs of each kind."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--quarter", type=Path, help="1_pretrain of a quarter of the steps")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    args = parser.parse_args()
    texts = read_texts(args.run / "data" / "pretrain" / f"{args.split}.parquet")
    training = read_texts(args.run / "data" / "pretrain" / "train.parquet")
    tokenizer = AutoTokenizer.from_pretrained(args.run / "1_pretrain")
    ngrams = count_ngrams(tokenizer, training)
    models = {"Fourstage": load(args.run / "1_pretrain")}
    if args.quarter:
        models["a quarter"] = load(args.quarter)
    print_likelihoods(texts, training, tokenizer, models, ngrams)
    print_pairs([*texts["brown"], *texts["chitchat"]], tokenizer, models, ngrams)


def read_texts(file: Path) -> dict[str, list[str]]:
    """Return the documents of each source."""
    texts: dict[str, list[str]] = {}
    for row in pq.read_table(file).to_pylist():
        texts.setdefault(row["kind"], []).append(row["text"])
    return texts


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def count_ngrams(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Sequence[str]]) -> KneserNey:
    """Count the n-grams of all texts. Id 0 is that of a special token, which no text contains."""
    return KneserNey((encode(tokenizer, text) for of_source in texts.values() for text in of_source), len(tokenizer))


def print_likelihoods(
    texts: Mapping[str, list[str]],
    training: Mapping[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    models: Mapping[str, PreTrainedModel],
    ngrams: KneserNey,
) -> None:
    """Print a line for each source, and one for all."""
    before = compressors.joined([text for of_source in training.values() for text in of_source])
    columns = [*models, "5-gram", "xz -9", "PPMd", "after training"]
    print(f"\nbits per byte{'':<12}{'kB':>6}" + "".join(f"{column:>22}" for column in columns))
    for name, documents in {**texts, "all": [text for of_source in texts.values() for text in of_source]}.items():
        sizes = [len(text.encode()) for text in documents]
        cells = [bits(document_losses(model, tokenizer, documents, CONTEXT), sizes) for model in models.values()]
        cells.append(bits([ngrams.loss(encode(tokenizer, text)) for text in documents], sizes))
        joined = compressors.joined(documents)
        for compressed in (
            compressors.xz(joined),
            compressors.ppmd(joined),
            compressors.ppmd(joined, before),
        ):
            cells.append(Estimate(8 * compressed / len(joined)))
        line = "".join(f"{shown(cell):>22}" for cell in cells)
        print(f"{name:<25}{sum(sizes) // 1000:>6}{line}", flush=True)


def bits(losses: Sequence[float], sizes: Sequence[int]) -> Estimate:
    """Return the bits per byte of documents whose losses are in nats."""
    return ratio([loss / math.log(2) for loss in losses], sizes)


def print_pairs(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    models: Mapping[str, PreTrainedModel],
    ngrams: KneserNey,
) -> None:
    """Print the share of minimal pairs that each model gets right."""
    pairs = minimal_pairs.make_pairs(texts, PAIRS)
    sides = [[pair.right for pair in pairs], [pair.wrong for pair in pairs]]
    losses = {
        name: [document_losses(model, tokenizer, side, CONTEXT) for side in sides] for name, model in models.items()
    }
    losses["5-gram"] = [[ngrams.loss(encode(tokenizer, text)) for text in side] for side in sides]
    # A unigram model would prefer the sentence with fewer and commoner tokens.
    losses["fewer tokens"] = [[len(encode(tokenizer, text)) for text in side] for side in sides]
    for kind in ("agreement", "article", "order"):
        example = next(pair for pair in pairs if pair.kind == kind)
        print(f"\n{kind}: {example.right}\n{'':<{len(kind) + 2}}{example.wrong}")
        for name, (right, wrong) in losses.items():
            estimate = minimal_pairs.score(right, wrong, [pair.kind for pair in pairs])[kind]
            print(f"    {name:<14}{shown(estimate)}, {estimate.n} pairs")


def shown(estimate: Estimate) -> str:
    """Return "1.361 (1.340 to 1.382)", or the value alone."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


if __name__ == "__main__":
    main()
