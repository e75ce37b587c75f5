"""What `tests.benchmarks.gpu` measures inside of a process, on the device that this process finds.

It is started by `gpu_bench` with the name of a function, a file for what the function returns, and its arguments.
"""

import json
import resource
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import hardware
from pipeline.config.fields import argument_types
from pipeline.config.parser import parse
from pipeline.evaluation.likelihood import answer_losses
from pipeline.models.generation import encode_prompts, end_tokens, generate
from pipeline.models.kernels.attention import validate_varlen
from pipeline.models.kernels.log_probs import token_log_probs
from pipeline.models.loading import load_model
from pipeline.rl.critic import token_values
from pipeline.rl.value_model import value_model_from
from tests.helpers.small_model import conversation, tokenizer

DEVICE = hardware.accelerator() or "cpu"


def kernels() -> dict[str, Any]:
    """Return what is wrong with FlashAttention over documents, by the number of key and value heads."""
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_hidden_layers": 1, "vocab_size": 64}
    models = {heads: LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=heads)) for heads in (9, 3)}
    return {str(heads): validate_varlen(model, DEVICE) for heads, model in models.items()}


def numbers(run: str, rows: str, draws: str) -> dict[str, Any]:
    """Measure the policy, the reward model and a critic of a run on its conversations.

    Args:
        run: A folder with `2_sft`, `3_reward` and `data` or `conversations.jsonl`.
        rows: How many conversations.
        draws: How often the first token of an answer is sampled.
    """
    policy, words = load_model(f"{run}/2_sft", "--run", dtype=torch.float32)
    judge, _ = load_model(f"{run}/3_reward", "--run", reward=True, dtype=torch.float32)
    critic = value_model_from(judge)
    for model in (policy, judge, critic):
        model.to(DEVICE).eval()
    messages = _conversations(run, int(rows))
    prompts = encode_prompts(words, [row[:-1] for row in messages])
    whole = [words.apply_chat_template(row, return_dict=False) for row in messages]
    batch = _pad(prompts, [ids[len(prompt) :] for ids, prompt in zip(whole, prompts, strict=True)])
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, autocast in (
            ("float32", nullcontext),
            ("bf16", lambda: torch.autocast(torch.device(DEVICE).type, torch.bfloat16)),
        ):
            asked = {"temperature": 1.0, "entropy": False, "entropy_gradient": False}
            log_probs, _ = token_log_probs(policy, *batch[:3], batch_size=16, autocast=autocast, **asked)
            values = token_values(critic, *batch[:3], 16, autocast)
            with autocast():
                scores = torch.stack([judge(torch.tensor([ids], device=DEVICE)).logits[0, 0].float() for ids in whole])
            figures = {"log_probs": log_probs[batch[3]], "values": values[batch[3]], "scores": scores}
            found[name] = {key: figure.float().cpu() for key, figure in figures.items()}
    ours = generate(policy, words, prompts, max_new_tokens=32)
    theirs = [_greedy(policy, prompt, end_tokens(policy, words)) for prompt in prompts]
    found["greedy"] = sum(a[0].tokens == b for a, b in zip(ours, theirs, strict=True)) / len(prompts)
    found["p_of_draws"] = _p_of_draws(policy, words, prompts[0], int(draws))
    return found


def _conversations(run: str, rows: int) -> list[Any]:
    if (Path(run) / "data").is_dir():
        return list(load_dataset(f"{run}/data", "sft", split=f"train[:{rows}]")["messages"])
    lines = (Path(run) / "conversations.jsonl").read_text().splitlines()[:rows]
    return [json.loads(line)["messages"] for line in lines]


def _pad(prompts: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor, int, Tensor]:
    """Return ids with prompts padded on the left and answers on the right, their mask, the answers' length and mask."""
    options: dict[str, Any] = {"batch_first": True, "padding_value": -1}
    left = pad_sequence([torch.tensor(ids) for ids in prompts], padding_side="left", **options)
    right = pad_sequence([torch.tensor(ids) for ids in answers], **options)
    ids = torch.cat([left, right], 1).to(DEVICE)
    return ids.clamp(min=0), (ids >= 0).long(), right.shape[1], (right >= 0).to(DEVICE)


def _greedy(model: Any, prompt: list[int], ends: list[int]) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": 32, "eos_token_id": ends, "pad_token_id": ends[0]}
    ids = model.generate(torch.tensor([prompt], device=DEVICE), **options)[0, len(prompt) :]
    return [int(token) for token in ids]


def _p_of_draws(model: Any, words: Any, prompt: list[int], draws: int) -> float:
    """Return the p-value of Pearson's chi-square test of sampled first tokens; rare tokens are taken together."""
    with torch.no_grad():
        expected = model(torch.tensor([prompt], device=DEVICE)).logits[0, -1].double().softmax(-1).cpu() * draws
    seen = torch.zeros_like(expected)
    for seed in range(draws // 1000):
        options = {"max_new_tokens": 1, "samples": 1000, "temperature": 1.0, "batch_size": 1000, "seed": seed}
        for completion in generate(model, words, [prompt], **options)[0]:
            seen[completion.tokens[0]] += 1
    often = expected >= 5
    pairs = [torch.cat([each[often], each[~often].sum()[None]]) for each in (seen, expected)]
    statistic = ((pairs[0] - pairs[1]).square() / pairs[1].clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(often.sum().double() / 2, statistic / 2))


def memory() -> dict[str, Any]:
    """Return the bytes, beyond the weights, that scoring 16 x 1,024 tokens takes with a vocabulary of Qwen's size."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=151_936, tie_word_embeddings=True)).to(DEVICE).eval()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    answer_losses(model, tokenizer(), [conversation("What is 1?", "It is 7. " * 600)] * 16, context=1024)
    return {"bytes": torch.cuda.max_memory_allocated() - before}


def frozen(recipe: str, *options: str) -> dict[str, Any]:
    """Train an adapter; return whether the frozen weights kept their bits, and how much the process has grown."""
    import importlib

    from pipeline.training import train

    found: dict[str, Any] = {}
    train_and_save = train.train_and_save

    def watch(trainer: Any) -> None:
        weights = {name: weight for name, weight in trainer.model.named_parameters() if not weight.requires_grad}
        before = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        found["adapted_bytes"] = sum(w.nbytes for name, w in weights.items() if "base_layer" in name)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        train_and_save(trainer)
        found["grown_bytes"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown)
        found["same"] = all(torch.equal(weight.cpu(), before[name]) for name, weight in weights.items())

    main = importlib.import_module(f"recipes.{recipe}").main
    with patch.object(train, "train_and_save", watch):
        main(*parse(*argument_types(main), argv=options))
    return found


def experts(counted: str, *options: str) -> dict[str, Any]:
    """Pretrain with experts, and return the seconds of training; `counted`: whether their tokens are counted."""
    from pipeline.models.experts import RouteCounter
    from pipeline.training import callbacks
    from recipes.pretrain import main

    def without_experts(model: Any, training: bool) -> RouteCounter:
        return RouteCounter(torch.nn.Identity(), training=training)

    arguments = parse(*argument_types(main), argv=options)
    with nullcontext() if counted == "yes" else patch.object(callbacks, "RouteCounter", without_experts):
        main(*arguments)
    state = json.loads((Path(arguments[1].output_dir) / "trainer_state.json").read_text())
    return {"seconds": next(log["train_runtime"] for log in state["log_history"] if "train_runtime" in log)}


if __name__ == "__main__":
    torch.save(globals()[sys.argv[1]](*sys.argv[3:]), sys.argv[2])
