"""`fourstage plan RECIPES`: estimate the memory, disk, time and cost of a run; nothing is trained or downloaded.

    fourstage plan recipes/base --num_processes 8 --gpu h100 --price 2.5
    fourstage plan recipes/pocket --hidden_size 256

Options of the recipes override the YAML files. For a stage whose model has N parameters:

    FLOPs     tokens x passes x (2 N + attention): a forward pass counts 1, a backward pass 2
    memory    of a model that is trained: weights 4 N bytes, gradients 4 N (8 N under DDP, which has buckets), optimizer
              8 N (AdamW; others need less) and, in mixed precision, a copy of the weights 2 N; of any other model: 4 N
    disk      12 N bytes for each checkpoint, and 4 N for the model
    time      FLOPs / (processes x peak x MFU), plus LAYER x layers x positions that are sampled one after the other
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.command_line import read_command_line
from pipeline.config.fields import field_types
from pipeline.errors import Problem, UserError, problems_of, refuse
from pipeline.progress import short_count, time_in_words
from pipeline.runner.launcher import count_processes, find_launch_file, shards_model
from pipeline.runner.plan import read_plan
from pipeline.runner.preflight import check_steps
from pipeline.runner.steps import Step
from pipeline.runner.workload import (
    DOCUMENT,
    LAYER,
    START,
    TEXT_RATE,
    VLLM_LAYER,
    Machine,
    Outputs,
    Workload,
    advice,
    evaluation_seconds,
    memory,
    read_workload,
)

ASSUMED = """
Assumed: {mfu:.0%} of the peak (--mfu; small models reach less); a text has 1/4 of max_length, a prompt and an answer
1/3 of the longest answer, plus a chat template that is on this disk; data on this disk have 4 characters per token;
sampling takes 1 ms for a position and layer, with vLLM 0.1 ms; critic, reference and reward models are as large as
the policy; a step starts in 3 s; an evaluation answers 400 rows of each data set, or its limit. Not included:
downloads, judges, tasks of lm-eval.
"""


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
    """Print the estimate for each stage of a recipe folder. Return 0 even if a stage does not fit into the memory."""
    print(f"reading {args.recipe} ...", file=sys.stderr, flush=True)
    problems: list[Problem] = []
    for name in ("num_processes", "gpu_memory", "tflops", "price", "mfu"):
        value = getattr(args, name)
        maximum = 1 if name == "mfu" else math.inf
        if value is not None and not 0 < value <= maximum:
            problems.append(Problem(f"--{name}", value, "must be above 0, and --mfu at most 1"))
    refuse(*problems)
    planned = read_plan(args.recipe).steps
    machine, steps = _check_steps([step for step in planned if step.stage.module], args)

    outputs = Outputs()
    # The workload of each stage, by the name of its directory.
    workloads: dict[str, Workload] = {}
    other_seconds = 0.0
    for step in steps:
        with problems_of(step.name):
            work = read_workload(step, outputs, machine)
        if work is None:
            # A step that generates data (`size_mb`) or reads documents, to train a tokenizer, for instance.
            text_bytes = 1e6 * (step.values.get("size_mb") or 0)
            text_bytes += DOCUMENT * (step.values.get("max_train_samples") or 0)
            other_seconds += START + text_bytes / TEXT_RATE
        else:
            print(f"planning {step.output.name} ...", file=sys.stderr, flush=True)
            workloads[step.output.name] = work
    evaluations_seconds = 0.0
    if workloads:
        first_workload = next(iter(workloads.values()))
        for step in planned:
            if step.kind == "evaluate":
                # The untrained model has no workload, but as many weights as the first stage, which starts from it.
                work = workloads.get(step.product.stem, first_workload)
                evaluations_seconds += evaluation_seconds(step, work, machine)
    other_entries: dict[str, dict[str, Any]] = {
        "other steps": {"hours": other_seconds / 3600},
        "evaluations": {"hours": evaluations_seconds / 3600},
    }
    entries = {name: _estimate_stage(work, machine) for name, work in workloads.items()}
    for entry in [*entries.values(), *other_entries.values()]:
        entry["cost"] = machine.cost(entry["hours"])
    if args.json:
        fits = all(entry["fits"] for entry in entries.values())
        print(json.dumps({"stages": entries, "others": other_entries, "fits": fits}, indent=2))
    else:
        _print_table(entries, other_entries, args.recipe, machine)
    return 0


def _check_steps(steps: Sequence[Step], args: argparse.Namespace) -> tuple[Machine, list[Step]]:
    """Return the machine, and the steps with the settings that the command line overrides.

    Raises:
        UserError: If an option is unknown, a step would reject its settings, or the GPU is unknown.
    """
    from pipeline import hardware

    launch_file = find_launch_file(args.recipe, args.config_file)
    processes = count_processes(args.num_processes, launch_file)
    # The argument dataclasses of all steps, each once, in the order of the steps.
    types: dict[type, None] = {}
    for step in steps:
        types |= dict.fromkeys(step.argument_types)
    options, problems = read_command_line(args.overrides, list(types))
    refuse(*problems)
    overridden_steps: list[Step] = []
    for step in steps:
        # An option applies to all steps that have such a field.
        overrides = {name: options[name] for name in field_types(*step.argument_types) if name in options}
        overridden_steps.append(replace(step, values={**step.values, **overrides}))
    problems = check_steps(overridden_steps, processes=processes, rewards=False, data=False)
    processor = hardware.find_processor(args.gpu, args.tflops, args.gpu_memory, processes)
    if processor is None:
        remedy = f"is not known; give --tflops and --gpu_memory, or choose from: {', '.join(hardware.CARDS)}"
        raise UserError(*problems, Problem("--gpu", args.gpu, remedy))
    refuse(*problems)
    machine = Machine(processes, shards_model(launch_file), processor, args.mfu, args.price)
    return machine, overridden_steps


def _estimate_stage(work: Workload, machine: Machine) -> dict[str, Any]:
    """Return the estimates for a stage, as `--json` prints them; `main` adds the cost."""
    from pipeline.training.checks import disk_bytes

    peak = machine.processor.single
    if work.activation_bytes == 2 and machine.processor.half:
        peak = machine.processor.half
    seconds = work.flops / work.processes / (machine.mfu * peak)
    sampling = _sampling_seconds(work)
    parts = {part: round(size) for part, size in memory(work).items()}
    total = sum(parts.values())
    fits = total <= machine.processor.memory
    suggestion = ""
    if machine.sharded and not work.sharded:
        suggestion = "PPO cannot be sharded; run it separately with another launch file"
    elif not fits:
        suggestion = advice(work, machine.processor.memory)
    disk = 0
    if work.trained_parameters:
        disk = disk_bytes(work.trained_parameters, work.settings)[1]
    return {
        "parameters": work.model.num_parameters(),
        "tokens": round(work.sequences * work.mean_tokens),
        "flops": work.flops,
        "memory_bytes": {**parts, "total": total},
        "disk_bytes": disk,
        "hours": (START + seconds + sampling) / 3600,
        "sampling_hours": sampling / 3600,
        "fits": fits,
        "advice": suggestion,
    }


def _sampling_seconds(work: Workload) -> float:
    """Return the seconds that a stage needs to launch the kernels with which it samples answers; 0 if it samples none.

    The multiplications are among the stage's FLOPs.
    """
    if not work.kind.samples:
        return 0.0
    seconds_per_layer = LAYER
    if work.settings.use_vllm:
        seconds_per_layer = VLLM_LAYER
    batches = work.sequences / (work.answers_at_once * work.processes)
    # A batch of answers is sampled position by position, up to the longest answer.
    positions = batches * work.max_tokens
    return positions * work.model.config.get_text_config().num_hidden_layers * seconds_per_layer


def _print_table(
    entries: Mapping[str, dict[str, Any]], other_entries: Mapping[str, dict[str, Any]], recipe: Path, machine: Machine
) -> None:
    """Print a table of the estimates, the assumptions, the memory by part, and advice for stages that do not fit.

    Args:
        entries: The estimates for each stage, from `_estimate_stage`.
        other_entries: The hours and the cost of all evaluations and of all other steps.
        recipe: The recipe folder, as it was typed.
        machine: The machine that the run is planned for.
    """
    table = {**entries, **other_entries}
    sums: dict[str, Any] = {}
    for key in ("disk_bytes", "hours", "cost"):
        sums[key] = sum(entry.get(key) or 0 for entry in table.values())
    row_format = "{:14} {:>10} {:>7} {:>8} {:>6} {:>8} {:>11} {:>11} {:>8}"
    print(f"{recipe} on {machine.processes} x {machine.processor}")
    print(row_format.format("stage", "parameters", "tokens", "FLOPs", "GB", "disk GB", "time", "sampling", "cost"))
    for name, entry in {**table, "in all": sums}.items():
        print(row_format.format(name, *_format_estimates(entry, machine)))
    print(ASSUMED.format(mfu=machine.mfu))
    print("GB of one process, by part:")
    for name, entry in entries.items():
        sizes = entry["memory_bytes"].items()
        parts = [f"{part} {size / 1e9:.2f}" for part, size in sizes if size and part != "total"]
        print(f"{name:14} {', '.join(parts)}")
        if entry["advice"]:
            print(f"{'':14} {'' if entry['fits'] else 'does not fit; '}{entry['advice']}")


def _format_estimates(entry: Mapping[str, Any], machine: Machine) -> list[str]:
    """Return the eight cells of an entry in the table, after its name; a cell without an estimate is empty."""

    def gigabytes(size: float) -> str:
        return f"{size / 1e9:.2f}"

    def time_of(hours: float) -> str:
        return time_in_words(3600 * hours)

    columns: list[tuple[float | None, Callable[[float], str]]] = [
        (entry.get("parameters"), short_count),
        (entry.get("tokens"), short_count),
        (entry.get("flops"), short_count),
        (entry.get("memory_bytes", {}).get("total"), gigabytes),
        (entry.get("disk_bytes"), gigabytes),
        (entry.get("hours"), time_of),
        (entry.get("sampling_hours"), time_of),
    ]
    cells: list[str] = []
    for number, format_number in columns:
        cell = ""
        if number:
            cell = format_number(number)
        cells.append(cell)
    cost = "-"
    if machine.price:
        cost = f"{entry['cost']:.2f}"
    return [*cells, cost]
