"""`fourstage plan RECIPES`: what a run will take, by arithmetic; nothing is trained or downloaded.

    fourstage plan recipes/base --num_processes 8 --gpu h100 --price 2.5
    fourstage plan recipes/pocket --hidden_size 256

Options of the recipes override the YAML files. For a stage whose model has N parameters:

    FLOPs     tokens x passes x (2 N + attention). A forward pass counts 1, a backward pass 2, activations that are
              computed again 1. Policy and critic are trained on a rollout `num_iterations` times; sampling, old
              log-probabilities, values, a reference and each reward model are forward passes
    memory    of a network that is trained, weights 4 N bytes, gradients 4 N (8 N under DDP, which has buckets) and
              optimizer 8 N (AdamW; others take less), of any other 4 N; a copy of the weights in 16 bits 2 N;
              activations and logits of a micro-batch; keys and values of the answers that are sampled at once
    disk      12 N bytes for each checkpoint, and 4 N for the model
    time      FLOPs / (processes x peak x MFU), and LAYER x layers x positions that are sampled one after the other

What share of its peak a processor reaches (MFU), and how long rows and answers are, shows only in a run: see ASSUMED.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem, UserError
from pipeline.progress import short_count, time_in_words
from pipeline.runner.launcher import check_launch_file, count_processes, launch_file, shards
from pipeline.runner.preflight import check_steps
from pipeline.runner.recipe import read_plan
from pipeline.runner.steps import Settings, Step, override_steps
from pipeline.stages import StageKind

# These imports take seconds, which `--help` must not.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.hardware import Processor

TEXT, ANSWER = 1 / 4, 1 / 3
LAYER, VLLM_LAYER = 1e-3, 1e-4
"""Seconds of a layer for one position of all answers: transformers launches its kernels one by one."""
LIBRARIES, TILE = 1.5e9, 2**27
"""Bytes of a process that are not tensors, and logits that TRL's trainers keep at once, at most."""
ASSUMED = """
Assumed: {mfu:.0%} of the peak (--mfu; small models reach less); a text has 1/4 of max_length, a prompt and an answer
1/3 of the longest answer, and data on this disk a token for 4 characters; sampling takes 1 ms for a position and layer,
with vLLM 0.1 ms; critic, reference and reward models are as large as the policy. Not included: evaluations, data,
tokenizers, and the start of each stage.
"""


@dataclass(frozen=True)
class Stage:
    """A step that trains or samples.

    Attributes:
        name, kind, own: Folder that it writes, what is known about its kind, and its settings.
        model, trained: Its model, on the meta device, and how many of its parameters are trained.
        data, text: Rows of its data, and tokens of one or, if answers are sampled, of a prompt.
        cut: Tokens at which a text or an answer is cut off.
        processes, sharded: Number of processes, and whether parameters are split over them.
        size: Bytes of a number in activations: 2, or 4 in float32.
    """

    name: str
    kind: StageKind
    own: Settings
    model: PreTrainedModel
    trained: int
    data: int
    text: float
    cut: int
    processes: int
    sharded: bool
    size: int


def row_length(stage: Stage, longest: bool = False) -> float:
    """Return the tokens of an average or the longest row: a block, a text, or a prompt with its answer."""
    if stage.kind.samples:
        return stage.text + stage.cut * (1 if longest else ANSWER)
    return stage.cut if longest or stage.own.packing else min(stage.text, stage.cut)


def rows(stage: Stage) -> float:
    """Return the rows that all processes read: blocks, texts, both texts of pairs, or answers."""
    own = stage.own
    if not stage.kind.measured:
        # Answers are sampled for people or annotators to choose from.
        return (own.max_prompts or stage.data) * own.samples_per_prompt
    batch = own.per_device_train_batch_size * own.gradient_accumulation_steps * stage.processes
    uses, steps = own.num_iterations or 1, own.max_steps
    if steps <= 0:
        each = stage.text / stage.cut if own.packing else (own.num_generations or 1) * uses
        steps = math.ceil(math.ceil(stage.data * each / batch) * own.num_train_epochs)
    return steps * batch * (1 if stage.kind.generates else 2) / uses


def passes(stage: Stage) -> int:
    """Return the passes over each token, where a backward pass counts as two."""
    own, training, uses = stage.own, 3 + stage.own.recompute, stage.own.num_iterations
    if not stage.kind.measured:
        return 1
    if not stage.kind.samples:
        return training
    if stage.kind.has_critic:
        # Sampling, old log-probabilities and values; then policy and critic are trained.
        return 3 + own.judges + own.reference + 2 * uses * training
    # If a rollout is used in one step, training itself computes the old log-probabilities.
    every = (own.steps_per_generation or own.gradient_accumulation_steps) * uses
    old = own.gradient_accumulation_steps % every > 0
    return 1 + old + own.judges + own.reference + uses * training


def flops(stage: Stage) -> float:
    """Return the floating-point operations of all processes."""
    from pipeline.models.experts import training_flops_per_token

    length = row_length(stage)
    # The function counts a forward and a backward pass, which are three.
    return rows(stage) * length * passes(stage) / 3 * training_flops_per_token(stage.model, round(length))


def sampled_at_once(stage: Stage) -> int:
    """Return the answers that a process samples at once."""
    own = stage.own
    if not stage.kind.samples or own.generation_batch_size:
        return (own.generation_batch_size or 0) // stage.processes
    batches = own.steps_per_generation or own.gradient_accumulation_steps
    return own.batch_size or own.per_device_train_batch_size * batches


def sampling_seconds(stage: Stage) -> float:
    """Return the time of sampling: a batch of answers is sampled position by position, up to the longest answer."""
    if not stage.kind.samples:
        return 0.0
    positions = rows(stage) / (sampled_at_once(stage) * stage.processes) * stage.cut
    layer = VLLM_LAYER if stage.own.use_vllm else LAYER
    return positions * layer * stage.model.config.get_text_config().num_hidden_layers


def memory(stage: Stage) -> dict[str, float]:
    """Return the bytes of one process, by part."""
    config, own, parameters = stage.model.config.get_text_config(), stage.own, stage.model.num_parameters()
    # Sharded weights are gathered, and copied, layer by layer.
    shares, layers = (stage.processes, config.num_hidden_layers) if stage.sharded else (1, 1)
    trained, longest = stage.trained / shares, row_length(stage, longest=True)
    read = (own.per_device_train_batch_size or 0) * (1 if stage.kind.generates else 2) * longest
    # Pretraining has all logits at once, TRL's trainers a tile of them, and a reward model has a score.
    logits = read * config.vocab_size if stage.kind.generates else 0
    if not stage.kind.from_scratch:
        logits = min(TILE, logits)
    half = own.use_peft and own.frozen_dtype in ("auto", "bfloat16")
    return {
        "weights": 4 * trained + (2 * parameters / layers if stage.size == 2 else 0),
        "gradients": (8 if stage.processes > 1 and not stage.sharded else 4) * trained,
        "optimizer": 8 * trained,
        "activations": read * activation_bytes(config, stage.size, own.recompute),
        # Logits and their gradient, and in float32 a copy, its log-softmax and a gradient.
        "logits": logits * (2 * stage.size + 3 * 4),
        "rollouts": sampled_at_once(stage) * longest * 2 * _widths(config)[1] * config.num_hidden_layers * stage.size,
        "frozen": own.frozen * parameters * (2 if half else 4) / shares,
        "other": LIBRARIES,
    }


def activation_bytes(config: Any, size: int, recompute: bool) -> float:
    """Return the bytes that a token leaves for the backward pass, with attention that keeps no scores.

    A layer keeps the inputs of its two norms in float32, as they are and normalised, and their outputs; queries, keys,
    values and the output of attention; the gate of its feed-forward network, the same activated, up, and their product.
    If activations are computed again, the inputs of all layers are kept, and everything of one layer at a time.
    """
    queries, keys = _widths(config)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    width *= 1 + (getattr(config, "num_local_experts", None) or 0)
    layer = 2 * 2 * 4 * hidden + size * (2 * hidden + 2 * queries + 2 * keys + 4 * width)
    return layers * 4 * hidden + layer if recompute else layers * layer


def _widths(config: Any) -> tuple[int, int]:
    """Return the numbers of a token's queries in a layer, and of its keys."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head


def advice(stage: Stage, room: float) -> str:
    """Return what makes a stage fit into `room` bytes, the least change first."""
    own = stage.own
    # Whether the model is sharded, whether activations are computed again, and the options that ask for this.
    choices = [(stage.sharded, own.recompute, ""), (stage.sharded, True, "--activation_checkpointing true, ")]
    larger = "LoRA (use_peft: true), more or larger GPUs"
    if not stage.kind.has_critic:
        larger += ", or recipes/accelerate/zero3.yaml"
        if stage.processes > 1:
            fsdp = f"--config_file recipes/accelerate/fsdp2.yaml --num_processes {stage.processes}, "
            choices += [(True, recompute, fsdp + words) for _, recompute, words in choices]
    batch = own.per_device_train_batch_size or 0
    for sharded, recompute, words in choices:
        for size in [size for size in range(batch, 0, -1) if batch % size == 0]:
            smaller = Settings(**{**vars(own), "recompute": recompute, "per_device_train_batch_size": size})
            if sum(memory(replace(stage, sharded=sharded, own=smaller)).values()) <= room:
                if size < batch:
                    words += f"--per_device_train_batch_size {size} and {batch // size} times the accumulation"
                return words.removesuffix(", ")
    return larger


def read_stage(step: Step, made: dict[str, Any], processes: int, sharded: bool, full: bool) -> Stage | None:
    """Return a step as a `Stage`, or None if it neither trains nor samples. `full`: whether this machine needs float32.

    `made` holds what earlier steps make, by folder: a model, the size of a vocabulary, or rows. This step's is added.
    """
    from trl import ModelConfig

    from pipeline.data.arguments import DataArguments
    from pipeline.data.splits import count_rows
    from pipeline.models.adapters import count_trainable
    from pipeline.models.loading import load_empty, load_tokenizer
    from pipeline.models.scratch import ScratchArguments, build_empty

    kind, own = step.stage, Settings.of(step)
    # Later steps need to know the size of the vocabulary, and how many choices people make.
    if step.kind in ("tokenizer", "votes"):
        made[own.output_dir] = own.vocab_size or own.min_votes
    if not kind.launched:
        return None
    if kind.from_scratch:
        name = own.tokenizer_name_or_path
        vocabulary = made.get(name) or len(load_tokenizer(name, "tokenizer_name_or_path"))
        model = build_empty(own.build(ScratchArguments), vocabulary)
    else:
        name = own.model_name_or_path
        model = made.get(name) or load_empty(name, "model_name_or_path", own.model_revision)
    content: Any = kind.data
    needed = not own.max_prompts and (own.max_steps or 0) <= 0
    data, text = count_rows(own.build(DataArguments), content, made, needed)
    trained = count_trainable(model, own.build(ModelConfig)) if kind.measured else 0
    made[own.output_dir] = model if trained else (own.max_prompts or data) * own.pairs_per_prompt
    # What several fields say together.
    positions = model.config.get_text_config().max_position_embeddings
    own.packing = kind.from_scratch or own.packing
    chosen = own.activation_checkpointing
    own.recompute = bool(own.gradient_checkpointing if chosen is None else chosen)
    own.judges = 1 if isinstance(own.reward_model_path, str) else len(own.reward_model_path or [])
    own.reference = ((own.kl_coef if kind.has_critic else own.beta) or 0) > 0
    # Under LoRA, the reference is the model without its adapter.
    adapts_critic = bool(own.use_peft and own.value_use_peft)
    own.frozen = own.judges + (1 + adapts_critic if own.use_peft or not trained else own.reference)
    if kind.has_critic:
        trained += trained if adapts_critic or not own.use_peft else model.num_parameters()
    cut = own.block_size or own.max_length or own.max_completion_length or own.max_new_tokens or positions
    text = text or cut * (ANSWER if kind.samples else TEXT)
    size = 4 if full or (step.values.get("bf16") is False and not own.fp16) else 2
    return Stage(step.output.name, kind, own, model, trained, data, text, cut, processes, sharded, size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan` to `parser`; what it does not know are options of the recipes."""
    parser.set_defaults(overrides=[])
    parser.add_argument("recipe", type=Path, help="folder of YAML files, or the name of one such as pocket")
    parser.add_argument("--num_processes", type=int, help="processes, one for each GPU (default: the launch file's)")
    parser.add_argument("--config_file", help="launch file of accelerate (default: as for `run`)")
    parser.add_argument("--gpu", help="kind of GPU, such as h100 or 4090 (default: measure this machine)")
    parser.add_argument("--gpu_memory", type=float, help="its memory in GB, for other kinds")
    parser.add_argument("--tflops", type=float, help="its peak in the precision of training, for other kinds")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches (0.4)")
    parser.add_argument("--price", type=float, help="price of a GPU for an hour")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.usage = "%(prog)s recipe [options] [--FIELD VALUE ...]"


def main(args: argparse.Namespace) -> int:
    """Print what each stage of a recipe folder takes. Return 0, whether or not it fits."""
    print(f"reading {args.recipe} ...", file=sys.stderr, flush=True)
    from pipeline import hardware, launch

    launch.quiet_libraries()
    path = launch_file(args)
    problems = [problem] if (problem := check_launch_file(path)) else []
    for name in ("num_processes", "gpu_memory", "tflops", "price", "mfu"):
        if (value := getattr(args, name)) is not None and not 0 < value <= (1 if name == "mfu" else math.inf):
            problems.append(Problem(f"--{name}", value, "must be above 0, and --mfu at most 1"))
    if problems:
        raise UserError(*problems)
    processes, sharded = count_processes(args), shards(path)
    steps = override_steps([step for step in read_plan(args.recipe).steps if step.stage.module], args.overrides)
    problems = check_steps(steps, processes=processes, rewards=False)
    if (processor := hardware.find_processor(args.gpu, args.tflops, args.gpu_memory, processes)) is None:
        remedy = f"is not known; give --tflops and --gpu_memory, or choose from: {', '.join(hardware.CARDS)}"
        problems.append(Problem("--gpu", args.gpu, remedy))
    if processor is None or problems:
        raise UserError(*problems)
    made: dict[str, Any] = {}
    entries = {}
    for step in steps:
        try:
            stage = read_stage(step, made, processes, sharded and not step.stage.has_critic, full=not processor.half)
        except UserError as error:
            raise UserError(*(replace(p, field=f"{step.name}: {p.field}") for p in error.problems)) from None
        if stage is not None:
            print(f"planning {stage.name} ...", file=sys.stderr, flush=True)
            entries[stage.name] = _entry(stage, processor, args, sharded)
    if args.json:
        print(json.dumps({"stages": entries, "fits": all(entry["fits"] for entry in entries.values())}, indent=2))
    else:
        _show(f"{args.recipe} on {processes} x {processor}", entries, args)
    return 0


def _entry(stage: Stage, processor: Processor, args: argparse.Namespace, sharded: bool) -> dict[str, Any]:
    """Return the figures of a stage, as `--json` prints them."""
    from pipeline.training.checks import disk_bytes

    speed = args.mfu * ((processor.half if stage.size == 2 else None) or processor.single)
    hours = (flops(stage) / (stage.processes * speed) + sampling_seconds(stage)) / 3600
    parts = {part: round(size) for part, size in memory(stage).items()}
    total = sum(parts.values())
    advised = ["PPO refuses to be sharded; run it apart, with another launch file"] * (sharded and not stage.sharded)
    advised += [advice(stage, processor.memory)] if total > processor.memory else []
    return {
        "parameters": stage.model.num_parameters(),
        "tokens": round(rows(stage) * row_length(stage)),
        "flops": flops(stage),
        "memory_bytes": {**parts, "total": total},
        "disk_bytes": disk_bytes(stage.trained, stage.trained, stage.own)[1] if stage.trained else 0,
        "hours": hours,
        "sampling_hours": sampling_seconds(stage) / 3600,
        "cost": None if args.price is None else hours * stage.processes * args.price,
        "fits": total <= processor.memory,
        "advice": "; ".join(advised),
    }


def _show(title: str, entries: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Print a table of the stages, what is assumed, memory by part, and what makes those fit that do not."""
    sums = {key: sum(entry[key] or 0 for entry in entries.values()) for key in ("disk_bytes", "hours", "cost")}
    row = "{:14} {:>10} {:>7} {:>8} {:>6} {:>8} {:>11} {:>11} {:>8}"
    print(title)
    print(row.format("stage", "parameters", "tokens", "FLOPs", "GB", "disk GB", "time", "sampling", "cost"))
    for name, entry in {**entries, "in all": sums}.items():
        counts = (short_count(entry[key]) if key in entry else "" for key in ("parameters", "tokens", "flops"))
        sizes = (entry.get("memory_bytes", {}).get("total"), entry["disk_bytes"])
        gigabytes = (f"{size / 1e9:.2f}" if size else "" for size in sizes)
        times = (time_in_words(3600 * entry[key]) if entry.get(key) else "" for key in ("hours", "sampling_hours"))
        print(row.format(name, *counts, *gigabytes, *times, f"{entry['cost']:.2f}" if args.price else "-"))
    print(ASSUMED.format(mfu=args.mfu), "GB of one process, by part:", sep="\n")
    for name, entry in entries.items():
        parts = (f"{part} {size / 1e9:.2f}" for part, size in entry["memory_bytes"].items() if size and part != "total")
        print(f"{name:14} {', '.join(parts)}")
        if entry["advice"]:
            print(f"{'':14} {'' if entry['fits'] else 'does not fit; '}{entry['advice']}")
