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
import json
import math
import sys
from collections.abc import Mapping, Sequence
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
    """Print what each stage of a recipe folder takes. Return 0 even if it does not fit."""
    print(f"reading {args.recipe} ...", file=sys.stderr, flush=True)
    problems: list[Problem] = []
    for name in ("num_processes", "gpu_memory", "tflops", "price", "mfu"):
        value = getattr(args, name)
        most = 1 if name == "mfu" else math.inf
        if value is not None and not 0 < value <= most:
            problems.append(Problem(f"--{name}", value, "must be above 0, and --mfu at most 1"))
    refuse(*problems)
    planned = read_plan(args.recipe).steps
    machine, steps = _check_steps([step for step in planned if step.stage.module], args)

    outputs = Outputs()
    stages: dict[str, Workload] = {}
    other_entries: dict[str, dict[str, Any]] = {"other steps": {"hours": 0.0}, "evaluations": {"hours": 0.0}}
    for step in steps:
        with problems_of(step.name):
            work = read_workload(step, outputs, machine)
        if work is None:
            text = 1e6 * (step.values.get("size_mb") or 0) + DOCUMENT * (step.values.get("max_train_samples") or 0)
            other_entries["other steps"]["hours"] += (START + text / TEXT_RATE) / 3600
        else:
            print(f"planning {step.output.name} ...", file=sys.stderr, flush=True)
            stages[step.output.name] = work
    if stages:
        first_stage = next(iter(stages.values()))
        for step in planned:
            if step.kind == "evaluate":
                # Untrained models have as many weights as the models trained from them.
                work = stages.get(step.product.stem, first_stage)
                other_entries["evaluations"]["hours"] += evaluation_seconds(step, work, machine) / 3600
    entries = {name: _entry(work, machine) for name, work in stages.items()}
    for entry in [*entries.values(), *other_entries.values()]:
        entry["cost"] = machine.cost(entry["hours"])
    if args.json:
        fits = all(entry["fits"] for entry in entries.values())
        print(json.dumps({"stages": entries, "others": other_entries, "fits": fits}, indent=2))
    else:
        _print_table(entries, other_entries, args.recipe, machine)
    return 0


def _check_steps(steps: Sequence[Step], args: argparse.Namespace) -> tuple[Machine, list[Step]]:
    """Return the machine, and the steps with the options of the command line. Raise a `UserError` for mistakes."""
    from pipeline import hardware

    launch_file = find_launch_file(args.recipe, args.config_file)
    processes = count_processes(args.num_processes, launch_file)
    # An option applies to all steps that have it.
    types: dict[type, None] = {}
    for step in steps:
        types |= dict.fromkeys(step.argument_types)
    options, problems = read_command_line(args.overrides, list(types))
    refuse(*problems)
    changed: list[Step] = []
    for step in steps:
        values = {name: options[name] for name in field_types(*step.argument_types) if name in options}
        changed.append(replace(step, values={**step.values, **values}))
    problems = check_steps(changed, processes=processes, rewards=False, data=False)
    processor = hardware.find_processor(args.gpu, args.tflops, args.gpu_memory, processes)
    if processor is None:
        remedy = f"is not known; give --tflops and --gpu_memory, or choose from: {', '.join(hardware.CARDS)}"
        raise UserError(*problems, Problem("--gpu", args.gpu, remedy))
    refuse(*problems)
    return Machine(processes, shards_model(launch_file), processor, args.mfu, args.price), changed


def _entry(work: Workload, machine: Machine) -> dict[str, Any]:
    """Return what a stage takes, as `--json` prints it."""
    from pipeline.training.checks import disk_bytes

    peak = machine.processor.single
    if work.size == 2 and machine.processor.half:
        peak = machine.processor.half
    seconds = work.flops / work.processes / (machine.mfu * peak)
    sampling = 0.0
    if work.kind.samples:
        # A batch of answers is sampled position by position, up to the longest answer.
        positions = work.rows / (work.at_once * work.processes) * work.cut
        layers = work.model.config.get_text_config().num_hidden_layers
        sampling = positions * layers * (VLLM_LAYER if work.settings.use_vllm else LAYER)
    parts = {part: round(size) for part, size in memory(work).items()}
    total = sum(parts.values())
    fits = total <= machine.processor.memory
    suggestion = ""
    if machine.sharded and not work.sharded:
        suggestion = "PPO cannot be sharded; run it separately with another launch file"
    elif not fits:
        suggestion = advice(work, machine.processor.memory)
    disk = 0
    if work.trained:
        disk = disk_bytes(work.trained, work.settings)[1]
    return {
        "parameters": work.model.num_parameters(),
        "tokens": round(work.rows * work.average),
        "flops": work.flops,
        "memory_bytes": {**parts, "total": total},
        "disk_bytes": disk,
        "hours": (START + seconds + sampling) / 3600,
        "sampling_hours": sampling / 3600,
        "fits": fits,
        "advice": suggestion,
    }


def _print_table(
    entries: Mapping[str, dict[str, Any]], other_entries: Mapping[str, dict[str, Any]], recipe: Path, machine: Machine
) -> None:
    """Print a table of the stages, the assumptions, memory by part, and advice for stages that do not fit.

    `entries` is what stages take, as `_entry` returns it, and `other_entries` what evaluations and other steps take.
    """
    table = {**entries, **other_entries}
    sums: dict[str, Any] = {}
    for key in ("disk_bytes", "hours", "cost"):
        sums[key] = sum(entry.get(key) or 0 for entry in table.values())
    row = "{:14} {:>10} {:>7} {:>8} {:>6} {:>8} {:>11} {:>11} {:>8}"
    print(f"{recipe} on {machine.processes} x {machine.processor}")
    print(row.format("stage", "parameters", "tokens", "FLOPs", "GB", "disk GB", "time", "sampling", "cost"))
    for name, entry in {**table, "in all": sums}.items():
        print(row.format(name, *_cells(entry, machine)))
    print(ASSUMED.format(mfu=machine.mfu))
    print("GB of one process, by part:")
    for name, entry in entries.items():
        sizes = entry["memory_bytes"].items()
        parts = [f"{part} {size / 1e9:.2f}" for part, size in sizes if size and part != "total"]
        print(f"{name:14} {', '.join(parts)}")
        if entry["advice"]:
            print(f"{'':14} {'' if entry['fits'] else 'does not fit; '}{entry['advice']}")


def _cells(entry: Mapping[str, Any], machine: Machine) -> list[str]:
    """Return the row of an entry in the table, without its name; what it lacks is empty."""
    cells = [""] * 7
    for column, key in enumerate(("parameters", "tokens", "flops")):
        if key in entry:
            cells[column] = short_count(entry[key])
    for column, size in ((3, entry.get("memory_bytes", {}).get("total")), (4, entry.get("disk_bytes"))):
        if size:
            cells[column] = f"{size / 1e9:.2f}"
    for column, key in ((5, "hours"), (6, "sampling_hours")):
        if entry.get(key):
            cells[column] = time_in_words(3600 * entry[key])
    cost = "-"
    if machine.price:
        cost = f"{entry['cost']:.2f}"
    return [*cells, cost]
