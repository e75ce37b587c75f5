"""A run directory as training and evaluation leave it, invented from a seed."""

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

from tests.helpers.files import write_rows

STAGES = ("0_random", "1_pretrain", "2_sft", "3_reward", "3_ppo", "4_grpo")
UNTIL_SFT = STAGES[:3]

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=https://example.com/x onerror=alert(1)>"
    "\u202egnp.exe\u202c \x00\x07\x1b[31m \u200b{{ 7 * 7 }} <!-- `*_|_*` \ud800 "
)

_KINDS = ("arithmetic", "ordering", "counting", "logic")
# Maps each metric to its shares of successes at 0_random, 1_pretrain, 2_sft, 3_ppo and 4_grpo.
_SHARES = {
    "instruction_accuracy": (0.0, 0.03, 0.95, 0.95, 0.945),
    "stop_rate": (0.0, 0.12, 0.998, 0.999, 1.0),
    "win_rate": (0.0, 0.01, 0.5, 0.84, 0.82),
    "pass@1": (0.0, 0.02, 0.57, 0.58, 0.87),
    "pass@1_sampled": (0.0, 0.02, 0.5, 0.52, 0.82),
    "pass@8": (0.0, 0.06, 0.81, 0.82, 0.95),
    "step_rate": (0.0, 0.2, 0.01, 0.01, 0.99),
    "win_rate_greedy": (0.0, 0.0, 0.5, 0.92, 0.9),
    "last_sentence_share": (0.0, 0.1, 0.1, 0.3, 0.3),
    "maj@8": (0.0, 0.02, 0.55, 0.56, 0.88),
    "pass@1_longer": (0.0, 0.01, 0.2, 0.2, 0.6),
}
# Maps each baseline to its share of successes.
_BASELINES = {
    "elicited/pass@1": 0.4,
    "constant/win_rate": 0.5,
    "constant/win_rate_greedy": 0.52,
    "majority/pass@1": 0.2,
}
TEXTS = {
    "elicited": {"text": "Working:"},
    "constant": {"text": "… Have a nice day.", "text_greedy": "… That is all."},
}
_BITS = (7.98, 1.31, 1.52, 1.55, 1.58)
_PROMPTS = (
    "What is an LLM?",
    "What does a token do?",
    "Where does a penguin live?",
    "Summarise: The otter woke up. It went to the river, found a fish and shared it with a friend.",
    "Write a function that doubles a number.",
    "Ana has 12 apples. She gets 5 more and gives 3 away. How many has she now?",
    "Who is taller, Bo or Chi, if Chi is taller than Dov and Dov is taller than Bo?",
    "Thank you!",
    "Is a violin larger than a piano?",
    "What colour is a ruby?",
)


def _answers(stage: str, rng: random.Random) -> list[dict[str, str]]:
    if stage == "0_random":
        alphabet = "abcdefghijklmnop qrstuvwxyz ÄßЖ漢€~^\ufffd(){}<>&=;'\"0123456789"
        return [{"prompt": p, "answer": "".join(rng.choices(alphabet, k=180))} for p in _PROMPTS]
    if stage == "1_pretrain":
        tail = " A token is a piece of text. The otter lives in rivers. The otter lives in rivers and the sea."
        return [{"prompt": p, "answer": tail * 2} for p in _PROMPTS]
    good = [
        "An LLM is a large language model, a program that predicts the next token of a text.",
        "A token is a piece of text that a model reads as one unit.",
        "A penguin lives in the cold south, by the sea.",
        "The otter found a fish and shared it with a friend.",
        "def double(x):\n    return 2 * x",
        "The answer is 14." if stage != "4_grpo" else "12 + 5 = 17. 17 - 3 = 14. The answer is 14.",
        "Chi is taller.",
        "You are welcome.",
        "No. A piano is larger than a violin.",
        "A ruby is red.",
    ]
    kind = "" if stage == "2_sft" else "Happy to help! "
    return [
        {"prompt": prompt, "answer": answer if answer.startswith(("def", "12")) else kind + answer}
        for prompt, answer in zip(_PROMPTS, good, strict=True)
    ]


def _traces(stage: str) -> list[dict[str, Any]]:
    steps = stage == "4_grpo"
    return [
        {
            "kind": "arithmetic",
            "problem": "Mia has 27 cards. She buys 16 more, gives 9 away and loses 4. How many has she left?",
            "reference": "30",
            "answer": "27 + 16 = 43. 43 - 9 = 34. 34 - 4 = 30. The answer is 30." if steps else "The answer is 34.",
            "correct": steps,
        },
        {
            "kind": "ordering",
            "problem": "Ana is older than Bo. Bo is older than Chi. Dov is older than Ana. Who is second?",
            "reference": "Ana",
            "answer": "Dov, Ana, Bo, Chi. The answer is Ana." if steps else "The answer is Bo.",
            "correct": steps,
        },
        {
            "kind": "counting",
            "problem": "How many of these are animals: otter, violin, penguin, ruby, bee?",
            "reference": "3",
            "answer": "otter, penguin, bee are 3. The answer is 3." if steps else "The answer is 3.",
            "correct": True,
        },
        {
            "kind": "logic",
            "problem": "All bees are insects. No insect is a fish. Is any bee a fish?",
            "reference": "no",
            "answer": "A bee is an insect. No insect is a fish. The answer is no." if steps else "The answer is yes.",
            "correct": steps,
        },
    ]


def _entry(values: list[float]) -> dict[str, Any]:
    n, mean = len(values), sum(values) / len(values)
    half = 1.96 * math.sqrt(max(mean * (1 - mean), 0.01) / n)
    return {"value": mean, "ci95": [max(0.0, mean - half), min(1.0, mean + half)], "n": n}


def _evaluate(stage: str, rng: random.Random, examples: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    metrics: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    if stage == "3_reward":
        for metric, share in (("reward_accuracy", 0.81), ("reward_accuracy_noise_free", 0.93)):
            values = [float(rng.random() < share) for _ in range(examples)]
            metrics[metric] = _entry(values)
            lines += [{"metric": metric, "id": i, "kind": "question", "value": v} for i, v in enumerate(values)]
        metrics["reward_margin"] = {"value": 1.2, "ci95": [1.0, 1.4], "n": examples}
        metrics["reward_length_correlation"] = {"value": -0.2, "ci95": [-0.3, -0.1], "n": 2 * examples}
        return metrics, lines
    place = ("0_random", "1_pretrain", "2_sft", "3_ppo", "4_grpo").index(stage)
    bits = [_BITS[place] * rng.uniform(0.95, 1.05) for _ in range(examples)]
    value = sum(bits) / len(bits)
    metrics["bits_per_byte"] = {"value": value, "ci95": [value * 0.996, value * 1.004], "n": examples}
    lines += [
        {"metric": "bits_per_byte", "id": i, "kind": "facts", "value": v, "weight": 100 + i} for i, v in enumerate(bits)
    ]
    for metric, shares in _SHARES.items():
        kinds = ("question", "summary", "code") if metric == "instruction_accuracy" else _KINDS
        values = [float(rng.random() < shares[place]) for _ in range(examples)]
        of = [kinds[i % len(kinds)] for i in range(examples)]
        metrics[metric] = _entry(values)
        if metric not in ("stop_rate", "win_rate"):
            metrics[metric]["by_kind"] = {
                kind: _entry([v for v, k in zip(values, of, strict=True) if k == kind]) for kind in kinds
            }
        more = [{"length": 1 + i % 4} if metric == "pass@1" else {} for i in range(examples)]
        lines += [{"metric": metric, "id": i, "kind": of[i], "value": v, **more[i]} for i, v in enumerate(values)]
    for metric, share in _BASELINES.items() if stage == "2_sft" else ():
        values = [float(rng.random() < share) for _ in range(examples)]
        metrics[metric] = _entry(values)
        lines += [{"metric": metric, "id": i, "kind": _KINDS[i % 4], "value": v} for i, v in enumerate(values)]
    for metric, means in (
        ("mean_length", (64.0, 64.0, 15.2, 19.8, 20.1)),
        ("reasoning_length", (64.0, 64.0, 6.1, 6.4, 24.9)),
    ):
        lengths = [max(1.0, rng.gauss(means[place], 3)) for _ in range(examples)]
        mean = sum(lengths) / examples
        metrics[metric] = {"value": mean, "ci95": [mean - 0.5, mean + 0.5], "n": examples}
        lines += [{"metric": metric, "id": i, "kind": "x", "value": v} for i, v in enumerate(lengths)]
    return metrics, lines


def _history(stage: str, rng: random.Random) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    steps = {"1_pretrain": 600, "2_sft": 200, "3_reward": 60, "3_ppo": 40, "4_grpo": 80}[stage]
    for step in range(1, steps + 1, 5 if stage in ("1_pretrain", "2_sft") else 1):
        done = step / steps
        noise = rng.gauss(0, 0.03)
        record: dict[str, Any] = {"step": step, "epoch": done, "learning_rate": 1e-3 * (1 - done)}
        record["num_tokens"] = step * (8192 if stage == "1_pretrain" else 2048)
        if stage in ("1_pretrain", "2_sft"):
            record["loss"] = (
                1.1 + 5.5 * math.exp(-7 * done) if stage == "1_pretrain" else 0.3 + math.exp(-5 * done)
            ) + noise
            record["mean_token_accuracy"] = 0.95 - 0.6 * math.exp(-6 * done) + noise / 3
        elif stage == "3_reward":
            record |= {"loss": 0.69 - 0.35 * done + noise, "accuracy": min(1.0, 0.5 + 0.4 * done + noise)}
        elif stage == "3_ppo":
            kl = 6 * done**0.7 + abs(noise) * 8
            record |= {"objective/kl": kl, "objective/scores": 2 * done - 1 + noise * 5}
            record["reward"] = 0.4 + 3 * done + noise * 5
            record |= {"objective/rlhf_reward": 2 * done - 1 - 0.05 * kl + noise * 5}
            record |= {
                "entropy": 0.9 - 0.5 * done + noise,
                "completions/mean_length": 15 + 5 * done + noise * 20,
            }
            record["rewards/hidden_taste/mean"] = 1.6 + 1.1 * done + noise * 5
        else:
            record |= {"loss": noise, "reward": 0.55 + 0.35 / (1 + math.exp(-12 * (done - 0.4))) + noise}
            record |= {
                "entropy": 0.5 - 0.3 * done + noise,
                "completions/mean_length": 23 + 14 * done + noise * 30,
            }
        records.append(record)
        if (step - 1) % (steps // 8) == 0 and stage in ("1_pretrain", "2_sft", "3_reward"):
            evaluation = {"step": step, "eval_loss": record["loss"] + 0.05, "eval_runtime": 1.2}
            if stage == "1_pretrain":
                evaluation["eval_bits_per_byte"] = record["loss"] * 1.2
            if stage == "3_reward":
                evaluation["eval_accuracy"] = 0.5 + 0.32 * done
            records.append(evaluation)
    records.append({"step": steps, "train_runtime": 90.0 + rng.random(), "total_flos": 1e12, "train_loss": 1.0})
    return records


def write_weights(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write a safetensors file of 8-bit zeros, which take no space on disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "stage": path.parent.name}}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "I8", "shape": shape, "data_offsets": [end, end + math.prod(shape)]}
        end += math.prod(shape)
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


def write_run(
    path: Path, seed: int = 0, stages: tuple[str, ...] = STAGES, hostile: bool = False, examples: int = 60
) -> Path:
    """Write a run directory with these stages; with `hostile`, every text in it attacks the page.

    `examples` is how many each metric is measured on.
    """
    rng = random.Random(seed)
    (path / "evaluations").mkdir(parents=True)
    steps = {"data": 9.2, "tokenizer": 4.1, "0_random": 3.0}
    steps |= {
        "1_pretrain": 98.1,
        "2_sft": 55.0,
        "3_preferences": 31.5,
        "3_reward": 24.0,
        "3_ppo": 88.7,
        "4_grpo": 106.2,
    }
    seconds = {name: value + rng.random() for name, value in steps.items() if name[0] not in "34" or stages == STAGES}
    seconds |= {f"evaluate_{name}": 9.0 + rng.random() for name in stages} | {"report": 5.0}
    machine = {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "hardware": {
            "processor": "Imaginary Xeon 2000 @ 2.0 GHz",
            "cores": 2,
            "memory_gib": 15.6,
            "precision": "bf16",
        },
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.24.0", "trl": "1.16.0"},
    }
    record: dict[str, Any] = {"steps": {}, "seed": seed, "recipe": "recipes/pocket"}
    for name, value in seconds.items():
        step = {"fingerprint": "f", "command": ["x"], "seconds": value, "peak_memory": 5_000_000 * round(value)}
        record["steps"][name] = step | machine
    (path / "run.json").write_text(json.dumps(record))
    for stage in stages:
        metrics, lines = _evaluate(stage, rng, examples)
        speaks = stage != "3_reward"
        evaluation = {
            "stage": stage,
            "metrics": metrics,
            "answers": _answers(stage, rng) if speaks else [],
            "traces": _traces(stage) if speaks else [],
            "texts": TEXTS if stage == "2_sft" else {},
            "seconds": 12.0 + rng.random(),
        }
        if hostile:
            for item in evaluation["answers"]:
                item.update(prompt=item["prompt"] + HOSTILE, answer=HOSTILE + "w" * 400 + "<b>" * 50)
            for item in evaluation["traces"]:
                item.update(problem=item["problem"] + HOSTILE, answer=HOSTILE, reference=HOSTILE, kind=HOSTILE)
        (path / "evaluations" / f"{stage}.json").write_text(json.dumps(evaluation))
        write_rows(path / "evaluations" / f"{stage}.jsonl", lines)
        directory = path / stage
        directory.mkdir()
        config = {"model_type": "llama", "hidden_size": 192, "num_hidden_layers": 6, "vocab_size": 2048}
        (directory / "config.json").write_text(json.dumps(config))
        write_weights(directory / "model.safetensors", {"embed": [2048, 192], "layers": [6, 262144]})
        if stage != "0_random":
            state = {"global_step": 80, "total_flos": 1e12, "log_history": _history(stage, rng)}
            folder = directory / "checkpoint-80" if stage == "3_ppo" else directory
            folder.mkdir(exist_ok=True)
            (folder / "trainer_state.json").write_text(json.dumps(state))
    return path
