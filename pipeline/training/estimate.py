"""What a stage will take: arithmetic, memory of a process, disk and time, before anything is trained or rented.

The floating-point operations are those that the training logs count (`callbacks.training_flops_per_token`). Memory is
the sum of what the trainer keeps: weights, gradients and moments of each parameter, activations of each token, logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from pipeline.models.experts import active_parameters
from pipeline.training.callbacks import training_flops_per_token

FSDP, ZERO = "recipes/accelerate/fsdp2.yaml", "recipes/accelerate/zero3.yaml"
FULL, MIXED = 4, 2
"""Bytes of a number in float32, and in the 16-bit type of mixed precision."""


@dataclass(frozen=True)
class Device:
    """A processor that trains, one for each process.

    Attributes:
        name: What it is called.
        train: FLOP/s that training reaches on it.
        forward: FLOP/s that passes without gradients reach.
        bandwidth: Bytes of memory that it reads in a second, which bounds the sampling of tokens.
        memory: Its memory in bytes.
        latency: Seconds that a layer takes for one token, however few sequences are sampled.
        overhead: Bytes that libraries and caches take beside the tensors.
        start: Seconds from the start of a stage to its first step, and from its last to its end.
        update: Seconds of an optimizer step, if the speed of training does not contain it.
        mixed: Bytes of a number in activations: `MIXED` or `FULL`.
        kernels: Whether attention keeps no weights for the backward pass (flash attention), and the head no logits
            (TRL's fused head).
    """

    name: str
    train: float
    forward: float
    bandwidth: float
    memory: float
    latency: float
    overhead: float
    start: float
    update: float = 0.0
    mixed: int = MIXED
    kernels: bool = True


PEAKS = {
    "b200": (2250e12, 8.0e12, 180e9),
    "h200": (989e12, 4.8e12, 141e9),
    "h100": (989e12, 3.35e12, 80e9),
    "a100": (312e12, 2.04e12, 80e9),
    "l40s": (362e12, 0.864e12, 48e9),
    "rtx4090": (165e12, 1.01e12, 24e9),
    "a10g": (70e12, 0.6e12, 24e9),
    "l4": (121e12, 0.3e12, 24e9),
}
"""Dense bf16 FLOP/s, bytes/s and bytes of memory, from NVIDIA's data sheets."""

GPU_LATENCY = 1e-3
"""Seconds that a layer of transformers takes for a token on any GPU: its kernels are launched one by one."""
VLLM_LATENCY = 1e-4
"""The same in vLLM, which replays a graph of all of them."""


def gpu(name: str, utilisation: float) -> Device:
    """Return a GPU of `PEAKS`, on which training reaches `utilisation` of the peak."""
    flops, bandwidth, memory = PEAKS[name]
    speed = flops * utilisation
    return Device(name.upper(), speed, speed, bandwidth, memory, GPU_LATENCY, overhead=1.5e9, start=60.0)


@dataclass(frozen=True)
class Rollouts:
    """The sampling of a stage.

    Attributes:
        rows: Completions that a process samples at once.
        group: Completions of a prompt, behind which a CPU computes them together.
        prompt: Tokens of a prompt, on average.
        completion: Tokens of a completion, on average.
        longest: Tokens of the longest completion.
        uses: Times that each is trained on; 0 if it is only sampled.
        passes: Passes without gradients over each: old log-probabilities, reference, critic, reward models.
        vllm: Whether vLLM samples.
    """

    rows: int
    group: int
    prompt: float
    completion: float
    longest: int
    uses: int
    passes: float
    vllm: bool = False


@dataclass(frozen=True)
class Work:
    """What one stage computes.

    Attributes:
        model: The model, on the meta device.
        tokens: Tokens of the whole stage, over all processes; those of a rollout count once.
        rows: Sequences in a micro-batch of a process.
        length: Tokens in such a sequence, at most.
        mean: Tokens in such a sequence, on average.
        padding: What it costs on a CPU, where batches are padded, as a multiple of that.
        longest: Tokens that the sequences of some batch are padded to on a CPU, if they are more.
        steps: Optimizer steps.
        trainable: Parameters with gradients, of the model and of a critic.
        moments: Bytes of the optimizer's state, for each of them.
        networks: Networks that are trained side by side: 2 with a critic.
        frozen: Parameters that are only used: of a base model under LoRA, a reference, reward models.
        converted: Whether those are in the 16-bit type of mixed precision.
        head: Share of the positions for which the logits of the vocabulary are computed; 0 for none.
        recompute: Whether activations are computed again in the backward pass.
        saved: Parameters in a checkpoint.
        checkpoints: How many are kept.
        data: Bytes of prepared data on disk.
        rollouts: The sampling, if there is any.
        processes: Number of processes.
        sharded: Whether weights, gradients and moments are split over the processes.
    """

    model: PreTrainedModel
    tokens: float
    rows: int
    length: int
    mean: float
    steps: float
    trainable: int
    padding: float = 1.0
    longest: float = 0.0
    moments: float = 8.0
    networks: int = 1
    frozen: int = 0
    converted: bool = False
    head: float = 1.0
    recompute: bool = False
    saved: int = 0
    checkpoints: int = 1
    data: float = 0.0
    rollouts: Rollouts | None = None
    processes: int = 1
    sharded: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a stage takes.

    Attributes:
        parameters: Of the model.
        tokens: As in `Work`.
        flops: Floating-point operations, over all processes.
        memory: Bytes of one process, by part.
        disk: Bytes of checkpoints, model and prepared data.
        seconds: From start to end.
    """

    parameters: int
    tokens: float
    flops: float
    memory: dict[str, float] = field(default_factory=dict)
    disk: float = 0.0
    seconds: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of memory of one process."""
        return sum(self.memory.values())


def estimate(work: Work, device: Device) -> Estimate:
    """Return what a stage takes on `device`, one for each process."""
    parameters = work.model.num_parameters()
    memory = memory_by_part(work, device)
    flops, seconds = _training(work, device)
    if work.rollouts:
        more_flops, more_seconds = _sampling(work, work.rollouts, device)
        flops, seconds = flops + more_flops, seconds + more_seconds
    disk = (work.checkpoints + 1) * FULL * work.saved + work.checkpoints * work.moments * work.trainable + work.data
    return Estimate(parameters, work.tokens, flops, memory, disk, seconds + device.start)


def _training(work: Work, device: Device) -> tuple[float, float]:
    """Return FLOPs over all processes, and seconds, of all that is not sampling."""
    per_token = training_flops_per_token(work.model, max(1, round(work.mean)))
    uses = work.rollouts.uses if work.rollouts else 1
    trained = work.tokens * per_token * uses * work.networks
    again = 1 + work.recompute / 3  # the forward pass once more, which is not counted as useful
    passes = work.tokens * per_token / 3 * (work.rollouts.passes if work.rollouts else 0)
    computed = _computed(work, device) / work.mean / work.processes
    seconds = (trained * again / device.train + passes / device.forward) * computed + work.steps * device.update
    return trained + passes, seconds


def _computed(work: Work, device: Device) -> float:
    """Return the tokens that a sequence costs: with padding on a GPU, without it and with shared prompts on a CPU."""
    if device.kernels:
        return work.length
    return (
        work.rollouts.completion + work.rollouts.prompt / work.rollouts.group
        if work.rollouts
        else work.mean * work.padding
    )


def _sampling(work: Work, rollouts: Rollouts, device: Device) -> tuple[float, float]:
    """Return FLOPs over all processes, and seconds, of sampling."""
    config = work.model.config.get_text_config()
    flops = work.tokens * training_flops_per_token(work.model, max(1, round(work.mean))) / 3
    batches = work.tokens / (rollouts.prompt + rollouts.completion) / rollouts.rows / work.processes
    weights = active_parameters(work.model) * device.mixed
    cache = rollouts.rows * (rollouts.prompt + rollouts.completion / 2) * _cache_per_token(work.model, device.mixed)
    latency = VLLM_LATENCY if rollouts.vllm else device.latency
    token = max(latency * config.num_hidden_layers, (weights + cache) / device.bandwidth)
    if not device.kernels:  # a CPU samples in batches from which finished rows are dropped, and counts their work
        read = flops * rollouts.prompt / (rollouts.prompt + rollouts.completion) / rollouts.group
        return flops, batches * rollouts.completion * token + read / device.forward / work.processes
    return flops, batches * rollouts.longest * token + flops / device.forward / work.processes


def memory_by_part(work: Work, device: Device) -> dict[str, float]:
    """Return bytes of one process: weights, gradients, optimizer, activations, rollouts, frozen models, other."""
    own = work.trainable / (work.processes if work.sharded else 1)
    reduced = FULL if work.processes > 1 and not work.sharded else 0  # DDP sums gradients in buckets of their own
    cast = device.mixed if device.mixed < FULL else 0  # autocast keeps the weights in 16 bits until the end of a pass
    layers = work.model.config.get_text_config().num_hidden_layers
    shared = 0 if work.converted else work.model.num_parameters()
    whole = shared * cast / (layers if work.sharded else 1)  # shards are gathered layer by layer
    return {
        "weights": FULL * own + whole,
        "gradients": (FULL + reduced) * own,
        "optimizer": work.moments * own,
        "activations": _activations(work, device),  # of one network at a time
        "rollouts": _rollout_memory(work, device),
        "frozen": (device.mixed if work.converted else FULL) * work.frozen / (work.processes if work.sharded else 1),
        "other": device.overhead,
    }


def _activations(work: Work, device: Device) -> float:
    """Return bytes that a micro-batch keeps for the backward pass of one network."""
    config = work.model.config.get_text_config()
    low = device.mixed
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    width = config.intermediate_size * (1 + (getattr(config, "num_local_experts", None) or 0))
    # Two norms, each with its input in float32, normalised in float32, and scaled; queries, keys and values; the output
    # of attention; gate, its activation, up and their product.
    layer = 2 * (2 * FULL + low) * hidden + low * (2 * heads * head_dim + 2 * keys) + low * 4 * width
    tokens = work.rows * max(_computed(work, device), 0.0 if device.kernels else work.longest)
    if not device.kernels:
        layer += low * heads * work.mean / 2 * 2  # scores and weights of what precedes a token
    kept = layers * FULL * hidden + layer if work.recompute else layers * layer
    # Logits, their copy in float32, its logarithm of the softmax, and the gradient.
    padded = work.rollouts.longest if work.rollouts and device.kernels else work.mean * work.head
    return tokens * kept + work.rows * padded * config.vocab_size * (2 * low + 3 * FULL)


def _rollout_memory(work: Work, device: Device) -> float:
    """Return bytes of the keys and values of what is sampled at once, and of the logits of a token."""
    rollouts = work.rollouts
    if rollouts is None:
        return 0.0
    length = rollouts.prompt + (rollouts.longest if device.kernels else rollouts.completion)
    cache = rollouts.rows * length * _cache_per_token(work.model, device.mixed)
    return cache + rollouts.rows * work.model.config.get_text_config().vocab_size * 3 * FULL


def _cache_per_token(model: PreTrainedModel, size: int) -> float:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2.0 * config.num_hidden_layers * heads * head_dim * size


def advice(work: Work, device: Device) -> str:
    """Return what makes a stage fit the memory of a device, the least change first; "" if it fits as it is."""
    if fits(work, device):
        return ""
    sharded = replace(work, sharded=True)
    recomputed = "--activation_checkpointing true"
    fsdp = f"--config_file {FSDP} --num_processes {work.processes}"
    options = [(work, []), (replace(work, recompute=True), [recomputed])]
    if work.networks == 1 and work.processes > 1:  # the critic of PPO cannot be sharded
        options += [(sharded, [fsdp]), (replace(sharded, recompute=True), [fsdp, recomputed])]
    for option, words in options:
        for rows in range(option.rows, 0, -1):
            if option.rows % rows == 0 and fits(replace(option, rows=rows), device):
                smaller = f"--per_device_train_batch_size {rows} and {work.rows // rows} times the accumulation"
                return ", ".join([*words, *([smaller] if rows < work.rows else [])])
    if work.networks == 1:
        return f"{ZERO} with offload_optimizer_device: cpu, more or larger GPUs, or LoRA (use_peft: true)"
    return "LoRA (use_peft: true), a smaller critic (value_model_path), or larger GPUs"


def fits(work: Work, device: Device) -> bool:
    """Return whether the memory of a device suffices."""
    return sum(memory_by_part(work, device).values()) <= device.memory


def steps_of(rows: float, batch: int, epochs: float) -> int:
    """Return the optimizer steps of `epochs` over `rows` rows in batches of `batch`."""
    return math.ceil(math.ceil(rows / batch) * epochs)
