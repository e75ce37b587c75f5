"""`fourstage plan RECIPES`: estimate what a run takes; nothing is trained or downloaded.

    fourstage plan recipes/base --num_processes 8 --gpu h100 --price 2.5
    fourstage plan recipes/pocket --hidden_size 256

Options of the recipes override the YAML files. For a stage whose model has N parameters:

    FLOPs     tokens x passes x (2 N + attention): a forward pass counts 1, a backward pass 2
    memory    of a network that is trained, weights 4 N bytes, gradients 4 N (8 N under DDP, which has buckets) and
              optimizer 8 N (AdamW; others take less), of any other 4 N; a copy of the weights in 16 bits 2 N
    disk      12 N bytes for each checkpoint, and 4 N for the model
    time      FLOPs / (processes x peak x MFU), plus LAYER x layers x positions that are sampled one after the other
"""

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.config.command_line import read_command_line
from pipeline.config.fields import field_types
from pipeline.errors import Problem, problems_of, refuse
from pipeline.evaluation.evaluate_yaml import DEFAULT_LENGTH
from pipeline.progress import short_count, time_in_words
from pipeline.runner.launcher import count_processes, launch_file, shards
from pipeline.runner.preflight import check_steps
from pipeline.runner.recipe import read_plan
from pipeline.runner.steps import Step

TEXT, ANSWER = 1 / 4, 1 / 3
START, TEXT_RATE = 3.0, 4e6
"""Seconds in which a step loads libraries, model and data, and bytes of text per second for `recipes.data` and for
training a tokenizer; both measured with recipes/pocket on 2 cores of an AMD EPYC."""
LAYER, VLLM_LAYER = 1e-3, 1e-4
"""Seconds per layer for one position of all answers: transformers launches its kernels one by one."""
ROWS, SAMPLED, AT_ONCE, DOCUMENT = 400, 64, 256, 4e3
"""Rows of a data set that an evaluation answers, problems with several answers, answers at once; bytes per document."""
LIBRARIES, TILE = 1.5e9, 2**27
"""Bytes of a process besides tensors, and maximum number of logits that TRL's trainers keep at once."""
ASSUMED = """
Assumed: {mfu:.0%} of the peak (--mfu; small models reach less); a text has 1/4 of max_length, a prompt and an answer
1/3 of the longest answer, plus a chat template that is on this disk; data on this disk have 4 characters per token;
sampling takes 1 ms for a position and layer, with vLLM 0.1 ms; critic, reference and reward models are as large as
the policy; a step starts in 3 s; an evaluation answers 400 rows of each data set, or its limit. Not included:
downloads, judges, tasks of lm-eval.
"""


class Settings(SimpleNamespace):
    """The settings of a step as attributes, with the defaults of its recipe; any other attribute is None."""

    def __getattr__(self, name: str) -> Any:
        return None

    def build(self, kind: type) -> Any:
        """Return the dataclass `kind` with these settings."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in values.items() if value is not None})


def count_work(stage: Settings) -> None:
    """Add the workload to a stage's settings: `rows` of blocks, texts (two in a pair), or prompts and answers.

    `average` and `longest` are tokens of a row, `passes` the passes over each token (a backward pass counts as two),
    `flops` the FLOPs of all processes, and `at_once` the answers that a process samples at once.
    """
    from pipeline.models.experts import training_flops_per_token

    kind, uses, training = stage.kind, stage.num_iterations or 1, 3 + stage.recompute
    stage.average, stage.longest = stage.cut if stage.packing else min(stage.text, stage.cut), stage.cut
    if kind.samples:
        stage.average, stage.longest = stage.text + ANSWER * stage.cut, stage.text + stage.cut
    if not kind.measured:
        # Answers are also sampled for validation and test, for people or annotators to choose from.
        held_out = stage.max_eval_prompts or 0
        prompts = (stage.max_prompts or stage.data) + held_out + (stage.max_validation_prompts or held_out)
        stage.rows, stage.passes, stage.at_once = prompts * stage.samples_per_prompt, 1, stage.batch_size
    else:
        batch = stage.per_device_train_batch_size * stage.gradient_accumulation_steps * stage.processes
        steps = stage.max_steps
        if steps <= 0:
            each = stage.text / stage.cut if stage.packing else (stage.num_generations or 1) * uses
            steps = math.ceil(math.ceil(stage.data * each / batch) * stage.num_train_epochs)
        stage.rows = steps * batch * stage.texts / uses
        rollout = stage.steps_per_generation or stage.gradient_accumulation_steps
        at_once = stage.per_device_train_batch_size * rollout
        if stage.generation_batch_size:
            at_once = stage.generation_batch_size // stage.processes
        stage.at_once = at_once if kind.samples else 0
        # If a rollout is used in one step, training itself computes the old log-probabilities.
        old = stage.gradient_accumulation_steps % (rollout * uses) > 0
        if not kind.samples:
            # Policy and reference of KTO also read each prompt with the answer to another one.
            stage.passes = training + stage.reference + 2 * (kind.data == "unpaired")
        elif kind.has_critic:
            # Sampling, old log-probabilities and values; then policy and critic are trained.
            stage.passes = 3 + stage.judges + stage.reference + 2 * uses * training
        else:
            stage.passes = 1 + old + stage.judges + stage.reference + uses * training

    config = stage.model.config.get_text_config()
    each = training_flops_per_token(stage.model, round(stage.average))
    # A reward model scores a text, and computes no logits.
    each -= 0 if kind.generates else 6 * config.vocab_size * config.hidden_size
    # This was one forward and one backward pass, which count three.
    stage.flops = stage.rows * stage.average * stage.passes / 3 * each


def evaluation_seconds(step: Step, stage: Settings, args: argparse.Namespace) -> float:
    """Return the time for answering instructions, prompts and problems, some of these `samples` times."""
    if not stage.kind.generates:
        return START
    own, model = Settings(**step.values), stage.model
    answers = 3 * (own.limit or ROWS) + min(own.limit or ROWS, SAMPLED) * (own.samples or 0)
    positions = own.max_new_tokens or DEFAULT_LENGTH
    layers = model.config.get_text_config().num_hidden_layers * (VLLM_LAYER if own.vllm else LAYER)
    # A prompt, and an answer that ends early.
    read = answers * positions * 2 * ANSWER * 2 * model.num_parameters()
    computing = read / (args.mfu * (args.processor.half or args.processor.single))
    return START + math.ceil(answers / AT_ONCE) * positions * layers + computing


def memory(stage: Settings) -> dict[str, float]:
    """Return the bytes of one process, by part."""
    config, parameters = stage.model.config.get_text_config(), stage.model.num_parameters()
    hidden, all_layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    # Sharded weights are gathered and copied layer by layer.
    shares, layers = (stage.processes, all_layers) if stage.sharded else (1, 1)
    trained = stage.trained / shares
    read = (stage.per_device_train_batch_size or 0) * stage.texts * stage.longest

    # For the backward pass, a layer keeps for each token its two norms' inputs in float32, raw and normalised, and
    # outputs; queries, keys, values and the output of attention (but no scores); and four times its feed-forward width.
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    width *= 1 + (getattr(config, "num_local_experts", None) or 0)
    layer = 2 * 2 * 4 * hidden + stage.size * (2 * hidden + 2 * queries + 2 * keys + 4 * width)
    # If activations are recomputed, only the inputs of all layers are kept, plus everything of one layer at a time.
    activations = all_layers * 4 * hidden + layer if stage.recompute else all_layers * layer
    # Pretraining has all logits at once, TRL's trainers have a tile of them, and a reward model only has scores.
    most = math.inf if stage.kind.from_scratch else TILE
    logits = min(most, read * config.vocab_size) if stage.kind.generates else 0
    # The weights that are frozen under an adapter are converted, unless they are sharded.
    half = stage.use_peft and stage.size == 2 and not stage.sharded and stage.frozen_dtype != "float32"
    return {
        "weights": 4 * trained + (2 * parameters / layers if stage.size == 2 else 0),
        "gradients": (8 if stage.processes > 1 and not stage.sharded else 4) * trained,
        "optimizer": 8 * trained,
        "activations": read * activations,
        # Logits and their gradient and, in float32, a copy, its log-softmax and a gradient.
        "logits": logits * (2 * stage.size + 3 * 4),
        "rollouts": stage.at_once * stage.longest * 2 * keys * all_layers * stage.size,
        "frozen": stage.frozen * parameters * (2 if half else 4) / shares,
        "other": LIBRARIES,
    }


def advice(stage: Settings, room: float) -> str:
    """Suggest what makes a stage fit into `room` bytes, the smallest change first."""
    batch = stage.per_device_train_batch_size or 0
    for recompute, words in ((stage.recompute, ""), (True, "--activation_checkpointing true, ")):
        for size in [size for size in range(batch, 0, -1) if batch % size == 0]:
            smaller = Settings(**{**vars(stage), "recompute": recompute, "per_device_train_batch_size": size})
            if sum(memory(smaller).values()) <= room:
                less = f"--per_device_train_batch_size {size} and {batch // size} times the gradient accumulation"
                return (words + less if size < batch else words).removesuffix(", ")
    larger = "LoRA (use_peft: true), more or larger GPUs"
    return larger if stage.kind.has_critic else f"{larger}, or recipes/accelerate/fsdp2.yaml or zero3.yaml"


def read_stage(step: Step, made: dict[Any, Any], args: argparse.Namespace) -> Settings | None:
    """Return the settings of a step with derived values, or None if it neither trains nor samples.

    These are `model` on the meta device, `trained` parameters, `data` rows of `texts` (two in a pair), each of `text`
    tokens (of a prompt, if answers are sampled), `cut`, the longest text or answer, `frozen` other networks, and
    `size`, the bytes of an activation. `made` has what earlier steps make; this step adds its own, by folder: a model,
    the size of a vocabulary, or rows; by ("tokens", folder) a row's length, by ("template", folder) a chat template's.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from trl import ModelConfig

    from pipeline.data.arguments import DataArguments
    from pipeline.data.splits import count_rows
    from pipeline.models.adapters import count_trainable
    from pipeline.models.loading import load_config, load_tokenizer, user_error_for
    from pipeline.models.scratch import ScratchArguments, build_empty

    kind, items = step.stage, [item for kind in step.argument_types for item in dataclasses.fields(kind)]
    defaults = {item.name: item.default for item in items if item.default is not dataclasses.MISSING}
    own = Settings(**{**defaults, **step.values})
    # Later steps need the size of the vocabulary, and the number of people's votes.
    if step.kind in ("tokenizer", "votes"):
        made[own.output_dir] = own.vocab_size or own.min_votes
    if not kind.launched:
        return None
    template = 0
    if kind.from_scratch:
        name = own.tokenizer_name_or_path
        vocabulary = made.get(name) or len(load_tokenizer(name, "tokenizer_name_or_path"))
        model = build_empty(own.build(ScratchArguments), vocabulary)
    elif (name := own.model_name_or_path) in made:
        model, template = made[name], made["template", name]
    else:
        with user_error_for("model_name_or_path", name), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(name, own.model_revision), trust_remote_code=False)
        tokenizer = load_tokenizer(own.tokenizer_name_or_path or name, "model_name_or_path")
        # Chat models may have a system prompt that is longer than a question.
        if tokenizer.chat_template:
            empty = [{"role": "user", "content": ""}]
            template = len(tokenizer.apply_chat_template(empty, add_generation_prompt=True, return_dict=False))
    content: Any = kind.data
    needed = not own.max_prompts and (own.max_steps or 0) <= 0
    data, text = count_rows(own.build(DataArguments), content, made, needed)
    trained = count_trainable(model, own.build(ModelConfig)) if kind.measured else 0
    made[own.output_dir] = model if trained else (own.max_prompts or data) * own.pairs_per_prompt
    own.packing = kind.from_scratch or own.packing
    chosen = own.activation_checkpointing
    own.recompute = bool(own.gradient_checkpointing if chosen is None else chosen)
    own.judges = 1 if isinstance(own.reward_model_path, str) else len(own.reward_model_path or [])
    own.reference = ((own.kl_coef if kind.has_critic else own.beta) or 0) > 0
    # With LoRA, the reference is the model without its adapter.
    adapts_critic = bool(own.use_peft and own.value_use_peft)
    own.frozen = own.judges + (1 + adapts_critic if own.use_peft or not trained else own.reference)
    if kind.has_critic:
        trained += trained if adapts_critic or not own.use_peft else model.num_parameters()
    own.kind, own.model, own.trained, own.data = kind, model, trained, data
    own.texts = 2 if content == "preference" else 1
    own.processes, own.sharded = args.processes, args.sharded and not kind.has_critic
    own.cut = own.block_size or own.max_length or own.max_completion_length or own.max_new_tokens
    own.cut = own.cut or model.config.get_text_config().max_position_embeddings
    own.text = text or made.get(("tokens", str(own.dataset_name))) or own.cut * (ANSWER if kind.samples else TEXT)
    own.text += template if kind.samples else 0
    own.size = 4 if not args.processor.half or (step.values.get("bf16") is False and not own.fp16) else 2
    count_work(own)
    made["tokens", own.output_dir], made["template", own.output_dir] = own.average, template
    return own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan` to `parser`; any others are options of the recipes."""
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
    """Print what each stage of a recipe folder takes. Return 0 even if it does not fit."""
    print(f"reading {args.recipe} ...", file=sys.stderr, flush=True)
    from pipeline import hardware

    problems = []
    for name in ("num_processes", "gpu_memory", "tflops", "price", "mfu"):
        if (value := getattr(args, name)) is not None and not 0 < value <= (1 if name == "mfu" else math.inf):
            problems.append(Problem(f"--{name}", value, "must be above 0, and --mfu at most 1"))
    refuse(*problems)
    args.processes, args.sharded = count_processes(args), shards(launch_file(args))
    planned = read_plan(args.recipe).steps
    steps = [step for step in planned if step.stage.module]
    # An option applies to all steps that have it.
    types = dict.fromkeys(kind for step in steps for kind in step.argument_types)
    given, problems = read_command_line(args.overrides, list(types))
    refuse(*problems)
    for place, step in enumerate(steps):
        own = {name: given[name] for name in field_types(*step.argument_types) if name in given}
        steps[place] = replace(step, values={**step.values, **own})
    problems = check_steps(steps, processes=args.processes, rewards=False, data=False)
    args.processor = hardware.find_processor(args.gpu, args.tflops, args.gpu_memory, args.processes)
    if args.processor is None:
        remedy = f"is not known; give --tflops and --gpu_memory, or choose from: {', '.join(hardware.CARDS)}"
        problems.append(Problem("--gpu", args.gpu, remedy))
    refuse(*problems)
    made: dict[Any, Any] = {}
    stages: dict[str, Settings] = {}
    others: dict[str, dict[str, Any]] = {name: {"hours": 0.0} for name in ("other steps", "evaluations")}
    for step in steps:
        with problems_of(step.name):
            stage = read_stage(step, made, args)
        if stage is None:
            text = 1e6 * (step.values.get("size_mb") or 0) + DOCUMENT * (step.values.get("max_train_samples") or 0)
            others["other steps"]["hours"] += (START + text / TEXT_RATE) / 3600
        else:
            print(f"planning {step.output.name} ...", file=sys.stderr, flush=True)
            stages[step.output.name] = stage
    for step in planned if stages else ():
        if step.kind == "evaluate":
            # Untrained models have as many weights as the models trained from them.
            stage = stages.get(step.product.stem, next(iter(stages.values())))
            others["evaluations"]["hours"] += evaluation_seconds(step, stage, args) / 3600
    entries = {name: _entry(stage, args) for name, stage in stages.items()}
    for entry in [*entries.values(), *others.values()]:
        entry["cost"] = None if args.price is None else entry["hours"] * args.processes * args.price
    if args.json:
        fits = all(entry["fits"] for entry in entries.values())
        print(json.dumps({"stages": entries, "others": others, "fits": fits}, indent=2))
    else:
        _show(entries, others, args)
    return 0


def _entry(stage: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a stage, as `--json` prints them."""
    from pipeline.training.checks import disk_bytes

    computing = stage.flops / stage.processes
    computing /= args.mfu * ((args.processor.half if stage.size == 2 else None) or args.processor.single)
    sampling = 0.0
    if stage.kind.samples:
        # A batch of answers is sampled position by position, up to the longest answer.
        positions = stage.rows / (stage.at_once * stage.processes) * stage.cut
        layers = stage.model.config.get_text_config().num_hidden_layers
        sampling = positions * layers * (VLLM_LAYER if stage.use_vllm else LAYER)
    parts = {part: round(size) for part, size in memory(stage).items()}
    total = sum(parts.values())
    advised = advice(stage, args.processor.memory) if total > args.processor.memory else ""
    if args.sharded and not stage.sharded:
        advised = "PPO cannot be sharded; run it separately with another launch file"
    return {
        "parameters": stage.model.num_parameters(),
        "tokens": round(stage.rows * stage.average),
        "flops": stage.flops,
        "memory_bytes": {**parts, "total": total},
        "disk_bytes": disk_bytes(stage.trained, stage)[1] if stage.trained else 0,
        "hours": (START + computing + sampling) / 3600,
        "sampling_hours": sampling / 3600,
        "fits": total <= args.processor.memory,
        "advice": advised,
    }


def _show(entries: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Print a table of the stages, the assumptions, memory by part, and advice for stages that do not fit."""
    table = {**entries, **others}
    sums = {key: sum(entry.get(key) or 0 for entry in table.values()) for key in ("disk_bytes", "hours", "cost")}
    row = "{:14} {:>10} {:>7} {:>8} {:>6} {:>8} {:>11} {:>11} {:>8}"
    print(f"{args.recipe} on {args.processes} x {args.processor}")
    print(row.format("stage", "parameters", "tokens", "FLOPs", "GB", "disk GB", "time", "sampling", "cost"))
    for name, entry in {**table, "in all": sums}.items():
        counts = (short_count(entry[key]) if key in entry else "" for key in ("parameters", "tokens", "flops"))
        sizes = (entry.get("memory_bytes", {}).get("total"), entry.get("disk_bytes"))
        gigabytes = (f"{size / 1e9:.2f}" if size else "" for size in sizes)
        times = (time_in_words(3600 * entry[key]) if entry.get(key) else "" for key in ("hours", "sampling_hours"))
        print(row.format(name, *counts, *gigabytes, *times, f"{entry['cost']:.2f}" if args.price else "-"))
    print(ASSUMED.format(mfu=args.mfu), "GB of one process, by part:", sep="\n")
    for name, entry in entries.items():
        parts = (f"{part} {size / 1e9:.2f}" for part, size in entry["memory_bytes"].items() if size and part != "total")
        print(f"{name:14} {', '.join(parts)}")
        if entry["advice"]:
            print(f"{'':14} {'' if entry['fits'] else 'does not fit; '}{entry['advice']}")
