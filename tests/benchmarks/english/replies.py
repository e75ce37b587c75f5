"""Stage 2 of `recipes/english`: what is wrong with replies for which there is no right answer, and thirty dialogues.

    python -m tests.benchmarks.english.replies runs/english/2_sft runs/english/4_grpo
    python -m tests.benchmarks.english.replies runs/english/4_grpo --dialogues recipes/english/DIALOGUES.md

Replies to the turns of held-out conversations, greedy and sampled at temperature 1, beside the person's reply to the
same turns. A reply

- ends, if its end comes within 80 tokens;
- repeats itself, if four words in a row come twice in it;
- repeats the conversation, if six words in a row of it come in the turns before;
- is copied, if it has six words or more and all of it is in the conversations of the training split, and is partly
  copied, if eight words in a row are.

A model that always says the same has good shares, so that the number of distinct replies stands beside them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.data.overlap import NgramIndex, ngrams, words
from pipeline.evaluation.intervals import outcome_mean
from pipeline.models.generation import Completion
from pipeline.models.loading import load_model
from pipeline.tools.chat_model import ChatModel
from tests.benchmarks.english.__main__ import shown
from tests.benchmarks.english.dialogues import OPENINGS

LENGTH = 80
WHOLE, PART = 6, 8
"""Words of a reply that is copied, and words in a row of one that is partly copied."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="stages of a run")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--dialogues", type=Path, help="write thirty dialogues with the last model to this file")
    args = parser.parse_args()
    models = {folder.name: load(folder) for folder in args.models}
    if args.dialogues:
        *_, (name, model) = models.items()
        args.dialogues.write_text(converse(name, model), encoding="utf-8")
        return
    data = args.models[0].parent / "data"
    rows = pq.read_table(data / "preferences" / f"{args.split}.parquet").to_pylist()
    checks = make_checks(data)
    replies = {"the person's": [Completion(row["reply"], [], stopped=True) for row in rows]}
    for name, model in models.items():
        replies[f"{name}, greedy"] = [completion for (completion,) in model.answer(rows)]
        replies[f"{name}, sampled"] = [completion for (completion,) in model.answer(rows, temperature=1.0)]
    print(f"{'':<18}{'distinct':>9}{'words':>7}" + "".join(f"{name:>24}" for name in checks))
    for name, completions in replies.items():
        texts = [completion.text for completion in completions]
        length = sum(len(text.split()) for text in texts) / len(texts)
        cells = [
            shown(outcome_mean([float(check(row, reply)) for row, reply in zip(rows, completions, strict=True)]))
            for check in checks.values()
        ]
        line = "".join(f"{cell:>24}" for cell in cells)
        print(f"{name:<18}{len(set(texts)) / len(texts):>9.3f}{length:>7.1f}{line}")


def load(folder: Path) -> ChatModel:
    model, tokenizer = load_model(str(folder), "MODEL")
    return ChatModel(model.eval(), tokenizer, LENGTH)


def make_checks(data: Path) -> dict[str, Callable[[dict[str, Any], Completion], bool]]:
    """Return what is counted: name -> whether it is true of a row and the reply to it."""
    # The turns of the conversations that stages 2 and 3 were trained on.
    turns: list[str] = []
    for config, column in (("sft", "messages"), ("preferences", "prompt")):
        for row in pq.read_table(data / config / "train.parquet").to_pylist():
            if row["kind"] == "talk":
                turns += [message["content"] for message in row[column]]
                turns += [row["reply"]] if "reply" in row else []
    turns = list(dict.fromkeys(turns))
    whole = {tuple(words(turn)) for turn in turns}
    parts = {gram for turn in turns for gram in ngrams(words(turn), PART)}

    def repeats_itself(row: dict[str, Any], reply: Completion) -> bool:
        grams = list(ngrams(words(reply.text), 4))
        return len(set(grams)) < len(grams)

    def repeats_conversation(row: dict[str, Any], reply: Completion) -> bool:
        index = NgramIndex(6)
        index.add(message["content"] for message in row["prompt"] if len(words(message["content"])) >= 6)
        return any(True for _ in index.find(reply.text))

    def is_copied(row: dict[str, Any], reply: Completion) -> bool:
        tokens = tuple(words(reply.text))
        return len(tokens) >= WHOLE and tokens in whole

    def is_partly_copied(row: dict[str, Any], reply: Completion) -> bool:
        return any(gram in parts for gram in ngrams(words(reply.text), PART))

    return {
        "ends": lambda row, reply: reply.stopped,
        "repeats itself": repeats_itself,
        "repeats the turns": repeats_conversation,
        "copied": is_copied,
        "partly copied": is_partly_copied,
    }


def converse(name: str, model: ChatModel) -> str:
    """Return thirty dialogues in Markdown; replies are greedy, as in `fourstage chat`."""
    parts = [
        "# Thirty dialogues, as they came\n\n"
        f"We begin, and speak first each time; `{name}` replies greedily, as `fourstage chat` does. What we say was "
        "written\nbefore any model had answered, and does not depend on its replies. Nothing was left out.\n"
    ]
    for number, ours in enumerate(OPENINGS, 1):
        messages: list[dict[str, str]] = []
        lines = [f"## {number}\n"]
        for text in ours:
            messages.append({"role": "user", "content": text})
            ((completion,),) = model.answer([{"prompt": messages}])
            messages.append({"role": "assistant", "content": completion.text})
            end = "" if completion.stopped else " [cut off]"
            lines += [f"- We: {text}", f"- It: {completion.text}{end}"]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
