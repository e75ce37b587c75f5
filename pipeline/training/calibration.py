"""The speed of this machine in training a given model, measured with a few real steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import psutil
import torch
from transformers import DynamicCache, PreTrainedModel

from pipeline import hardware
from pipeline.models.attention import choose_attention
from pipeline.training.callbacks import training_flops_per_token
from pipeline.training.estimate import FULL, MIXED, Device, Work

TOKENS = 2048
"""Tokens of a step that is timed, at most."""
FLOPS = 1e12
"""Operations of such a step above which it would take too long; the speed is then estimated."""
SHARE_OF_MATMUL = 0.3
"""Share of the speed of large matrix multiplications that training reaches, where it is not measured."""
OVERHEAD = {
    "pretrain": (80e6, 80e6),
    "sft": (200e6, 135e6),
    "reward": (185e6, 100e6),
    "ppo": (190e6, 40e6),
    "grpo": (90e6, 0.0),
    "preferences": (420e6, 340e6),
}
"""Bytes that a stage takes beside its tensors, in mixed precision and in float32: code that is loaded late, buffers of
the data libraries, the kernels of many shapes (of oneDNN, for bfloat16), and freed blocks, which the allocator keeps.
Measured on recipes/pocket with `hidden_size` 128, 256 and 512 (float32: not 512), in 30 steps, or 8 with rollouts; with
120, PPO takes 100 MB more."""
START = 1.4
"""Seconds of a stage beside training (imports, checks, data, saving), as a multiple of what its imports take: 1.1 was
measured for `python -m recipes.KIND`, 1.6 with `accelerate launch`."""
ROUNDS = 3


def this_machine(
    work: Work, kind: str, optimizer: Callable[[PreTrainedModel], torch.optim.Optimizer], imports: float, dtype: str
) -> Device:
    """Return this machine as one process of `work` finds it.

    Real steps of the model are timed: forward, backward, optimizer and, if the stage samples, the next token. A model
    that is too large for that gets a share of the speed of a matrix multiplication.

    Args:
        work: The stage, whose model is on the meta device.
        kind: Its kind.
        optimizer: Makes its optimizer.
        imports: Seconds that this machine takes to import what the stages import.
        dtype: Precision of its training: "bf16", "fp16" or "fp32".
    """
    common = {
        "name": "this machine",
        "memory": psutil.virtual_memory().total / work.processes,
        "overhead": OVERHEAD[kind][dtype == "fp32"],
        "start": START * imports,
        "mixed": FULL if dtype == "fp32" else MIXED,
        "kernels": hardware.accelerator() is not None,
    }
    length = max(2, round(work.mean))
    rows = max(1, min(work.rows, TOKENS // length))
    flops = rows * length * training_flops_per_token(work.model, length)
    if flops > FLOPS or hardware.accelerator() or work.model.num_parameters() * 32 > psutil.virtual_memory().available:
        speed = hardware.matmul_peak(dtype) * SHARE_OF_MATMUL
        return Device(train=speed, forward=speed, bandwidth=10e9, latency=1e-3, **common)
    model = type(work.model)(copy.deepcopy(work.model.config))
    if not work.rollouts:
        choose_attention(model)
    ids = torch.zeros(rows, length, dtype=torch.long)

    def forward(**options: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return model(ids, use_cache=False, **options)

    def train() -> None:
        forward(labels=ids).loss.backward()

    with torch.no_grad():
        passed = _best(forward)
    trained, update = (_best(train), _best(optimizer(model).step)) if work.trainable else (3 * passed, 0.0)
    latency = _decoding(model, work, dtype) if work.rollouts else 0.0
    shared = work.processes  # the cores
    return Device(
        train=flops / trained / shared,
        forward=flops / 3 / passed / shared,
        bandwidth=float("inf"),
        latency=latency * shared / model.config.num_hidden_layers,
        update=update * shared,
        **common,
    )


def _decoding(model: PreTrainedModel, work: Work, dtype: str) -> float:
    """Return the seconds of one token of all completions that are sampled at once."""
    assert work.rollouts is not None
    ids = torch.zeros(work.rollouts.rows, max(1, round(work.rollouts.prompt)), dtype=torch.long)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        cache = DynamicCache(config=model.config)
        model(ids, cache=cache, use_cache=True, logits_to_keep=1)
        return _best(lambda: model(ids[:, :1], cache=cache, use_cache=True))


def _best(function: Callable[[], object]) -> float:
    """Return the fewest seconds of some calls after a first one, which is slower.

    Where other programs use the cores as well, fewer seconds of the processor pass than of the clock.
    """
    seconds = []
    for _ in range(1 + ROUNDS):
        begin, begun = time.perf_counter(), time.process_time()
        function()
        seconds.append(min(time.perf_counter() - begin, time.process_time() - begun))
    return min(seconds[1:])
