"""A world of ten words with something to lose: policies that learned to answer, and rewards that keep or break them.

An answer is read as the words of the question, its own words, and whether it ended.
"""

import copy
import functools
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from pipeline.models.kernels.log_probs import token_log_probs
from pipeline.models.kernels.sampler import sample
from pipeline.rl.rewards import RewardModel
from tests.helpers import ppo_toy as toy

TOKENIZER = toy.tokenizer()
END = TOKENIZER.eos_token_id
LIMIT = 16
"""Tokens of a completion."""

SENTENCE = ["yes", "no", "hello", "why", "yes"]

# ---- Rewards


def quality(topics: list[str], words: list[str], ended: bool) -> float:
    """Return how good an answer is: it greets, mentions what it was asked about, and does not repeat itself."""
    if not ended or not words:
        return 0.0
    mentioned = sum(word in words for word in topics) / len(topics)
    distinct = len(set(words)) / len(words)
    return ((words[0] == "hello") + mentioned + distinct) / 3


def puzzle(topics: list[str], words: list[str], ended: bool) -> float:
    """Check for one answer of seven words, which nobody finds by chance."""
    return float(ended and words == (topics[::-1] * 7)[:7])


REWARDS: dict[str, Callable[[list[str], list[str], bool], float]] = {
    "quality": quality,
    "mentions": lambda topics, words, ended: float(ended and topics[-1] in words),
    "first": lambda topics, words, ended: float(ended and words[:1] == topics[:1]),
    "single": lambda topics, words, ended: float(ended and words == topics[:1]),
    "brief": lambda topics, words, ended: float(ended and len(words) == 1 and words[0] in topics),
    "repeat": lambda topics, words, ended: float(ended and words == topics),
    "long": lambda topics, words, ended: float(ended and len(words) >= 6),
    "puzzle": puzzle,
    "blind": lambda topics, words, ended: quality(topics, words, ended) + words.count("yes") / 4,
    "empty": lambda topics, words, ended: 1 - len(words) / 8,
    "endless": lambda topics, words, ended: len(words) / 8,
    "fixed": lambda topics, words, ended: sum(w == s for w, s in zip(words, SENTENCE, strict=False)) / 5 + ended / 5,
}
"""The first seven can be had without a collapse; `brief` and `single` leave few answers to choose from. Then: nobody
finds the answer, a word pays whatever is asked, length pays alone, and the same sentence pays each time."""


def as_function(name: str) -> Any:
    """Return a reward as the trainers call it."""

    def reward(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        texts = [(p[-1]["content"].split(), c[0]["content"].split()) for p, c in zip(prompts, completions, strict=True)]
        return [REWARDS[name](*text, ids[-1] == END) for text, ids in zip(texts, completion_ids, strict=True)]

    reward.__name__ = f"{name}_reward"
    return reward


# ---- Models


def question(rng: random.Random) -> list[str]:
    return rng.sample(toy.WORDS, rng.randint(1, 3))


def answer(rng: random.Random, topics: list[str]) -> list[str]:
    """Return what a person might say: most of the words of the question, among others."""
    words = [word for word in topics if rng.random() < 0.7] + rng.choices(toy.WORDS, k=rng.randint(1, 5))
    rng.shuffle(words)
    return words


def strange_answer(rng: random.Random) -> list[str]:
    """Return an answer of any length, of few words, or the start of the sentence that a reward may be stuck on."""
    words = rng.choices(rng.sample(toy.WORDS, rng.randint(1, 4)), k=rng.randint(0, LIMIT - 1))
    return rng.choice([words, SENTENCE[: rng.randint(1, 5)] + words[: rng.randint(0, 3)]])


def encode(topics: list[str], words: list[str], ended: bool = True) -> list[int]:
    text = ["<user>", *topics, "<assistant>", *words, *(["<end>"] if ended else [])]
    ids: list[int] = TOKENIZER.convert_tokens_to_ids(text)
    return ids


def pad(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """Return token ids (rows, longest); padding is token 0."""
    width = max(map(len, rows))
    filled = [([0] * (width - len(row)), [*row]) for row in rows]
    return torch.tensor([gap + row if left else row + gap for gap, row in filled])


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, learning_rate: float = 1e-2) -> Any:
    """Minimise a loss, which takes other examples each time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def tuned_policy(seed: int) -> Any:
    """Return a policy that answers as people do."""
    torch.manual_seed(seed)
    model, rng = LlamaForCausalLM(toy.llama_config(initializer_range=0.1)), random.Random(seed)

    def loss() -> Tensor:
        questions = [question(rng) for _ in range(64)]
        ids = pad([encode(words, answer(rng, words)) for words in questions])
        starts = torch.tensor([[len(words) + 2] for words in questions])
        learned = (torch.arange(ids.shape[1]) >= starts) & (ids > 0)
        output: Tensor = model(input_ids=ids, labels=ids.where(learned, -100)).loss
        return output

    return fit(model, loss, 300)


def reward_model(name: str, seed: str) -> Any:
    """Return a copy of `learned_reward`, which a trainer may change."""
    return copy.deepcopy(learned_reward(name, seed))


@functools.cache
def learned_reward(name: str, seed: str) -> Any:
    """Return a reward model that has seen what a reward gives to usual and to strange answers, some of them cut off."""
    rng = random.Random(f"{name} {seed}")
    torch.manual_seed(rng.randrange(10**6))
    config = toy.llama_config(num_labels=1, initializer_range=0.1)
    # Whether an answer mentions a word is harder to see than to learn to mention it.
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 32, 4, 4
    model = LlamaForSequenceClassification(config)

    def loss() -> Tensor:
        texts = []
        for row in range(64):
            topics = question(rng)
            texts.append((topics, strange_answer(rng) if row % 2 else answer(rng, topics), rng.random() < 0.85))
        scores = torch.tensor([REWARDS[name](*text) for text in texts])
        ids = pad([encode(*text) for text in texts])
        return nn.functional.mse_loss(model(input_ids=ids, attention_mask=(ids > 0).long()).logits[:, 0], scores)

    return fit(model, loss, 400)


# ---- Data


def questions(seed: int) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list([{"prompt": [{"role": "user", "content": " ".join(question(rng))}]} for _ in range(128)])


def pairs(policy: PreTrainedModel, seed: int) -> Dataset:
    """Return pairs of answers of a policy, of which the one with the higher quality was chosen."""
    rng = random.Random(f"pairs {seed}")
    # What was sampled before depends on which reward models this process has learned already.
    torch.manual_seed(seed)
    questions = [question(rng) for _ in range(1024)]
    rows = []
    for words, *both in zip(questions, complete(policy, questions), complete(policy, questions), strict=True):
        scored = sorted((quality(words, *read(ids)), " ".join(read(ids)[0])) for ids in both)
        if scored[0][0] < scored[1][0]:
            texts = {"prompt": ("user", " ".join(words)), "chosen": ("assistant", scored[1][1])}
            texts["rejected"] = ("assistant", scored[0][1])
            rows.append({key: [{"role": role, "content": text}] for key, (role, text) in texts.items()})
    return Dataset.from_list(rows)


# ---- Measuring a policy


def complete(model: PreTrainedModel, questions: list[list[str]]) -> list[list[int]]:
    """Sample an answer to each question."""
    config = GenerationConfig(max_new_tokens=LIMIT, do_sample=True, eos_token_id=END, top_k=0)
    training = model.training
    with torch.no_grad():
        completions = sample(model.eval(), [encode(words, [], ended=False) for words in questions], config)
    model.train(training)
    return completions


def read(ids: list[int]) -> tuple[list[str], bool]:
    """Return the words of a completion, and whether it ended."""
    return TOKENIZER.decode(ids, skip_special_tokens=True).split(), ids[-1] == END


def outcome(model: PreTrainedModel, judged: str, seed: int) -> dict[str, float]:
    """Return the mean of a reward, the share of the most frequent answer, and how answers end."""
    rng = random.Random(f"outcome {seed}")
    questions = [question(rng) for _ in range(512)]
    torch.manual_seed(seed)
    answers = [read(ids) for ids in complete(model, questions)]
    return {
        "reward": statistics.fmean(REWARDS[judged](a, *b) for a, b in zip(questions, answers, strict=True)),
        "most frequent": Counter(" ".join(words) for words, _ in answers).most_common(1)[0][1] / len(answers),
        "words": statistics.fmean(len(words) for words, _ in answers),
        "ended": statistics.fmean(ended for _, ended in answers),
    }


def figures(
    policy: PreTrainedModel, reference: PreTrainedModel, judge: RewardModel, seed: int, rows: int = 64
) -> dict[str, float]:
    """Return what PPO would log of the answers of a policy."""
    rng = random.Random(f"checkpoint {seed}")
    questions = [question(rng) for _ in range(rows)]
    completions = complete(policy, questions)
    ids = torch.cat([pad([encode(words, [], ended=False) for words in questions], left=True), pad(completions)], dim=1)
    mask, length = (ids > 0).long(), max(map(len, completions))
    chosen = mask[:, -length:]

    def log_probs(model: PreTrainedModel) -> tuple[Tensor, Any]:
        settings: dict[str, Any] = {"batch_size": None, "temperature": 1.0, "entropy": True, "entropy_gradient": False}
        return token_log_probs(model, ids, mask, length, autocast=nullcontext, **settings)

    with torch.no_grad():
        (policy_log_probs, entropies), (reference_log_probs, _) = log_probs(policy), log_probs(reference)
    prompts = [[{"role": "user", "content": " ".join(words)}] for words in questions]
    said = [[{"role": "assistant", "content": " ".join(read(ids)[0])}] for ids in completions]
    scores = judge(prompts, said, completions)
    return {
        "entropy": float((entropies * chosen).sum() / chosen.sum()),
        "completions/mean_length": statistics.fmean(map(len, completions)),
        "completions/clipped_ratio": statistics.fmean(ids[-1] != END for ids in completions),
        "objective/kl": float(((policy_log_probs - reference_log_probs) * chosen).sum(1).mean()),
        "reward": statistics.fmean(scores),
        "reward_std": statistics.stdev(scores),
        "reward_max": max(scores),
    }
