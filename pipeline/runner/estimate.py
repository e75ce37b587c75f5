"""`python -m pipeline plan RECIPES`: what a run will take, before a node is rented; nothing is trained or downloaded.

    python -m pipeline plan recipes/base --num_processes 8 --gpu h100 --price 2.5
    python -m pipeline plan recipes/pocket --hidden_size 256

For each stage it prints parameters, tokens, floating-point operations, the memory of one GPU by part, disk, hours and
cost. Options of the recipes override the YAML files. Without `--gpu`, the speed of this machine is measured with a few
real steps. Evaluations, the generation of data and the training of a tokenizer are left out.

Lengths of texts are taken from data that are on this disk. Otherwise a prompt has a third of the longest answer, and a
conversation, or an answer of a pair with its prompt, a quarter of `max_length`. A sampled answer has a third of the
longest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from pipeline.config.yaml_file import read_yaml, unknown_field
from pipeline.errors import Problem, UserError
from pipeline.runner.launcher import check_launch_file, launch_file, shards
from pipeline.runner.plan import read_plan
from pipeline.runner.steps import KINDS, Step, check_steps

if TYPE_CHECKING:  # these imports take seconds, which `--help` must not
    from pipeline.training.estimate import Device, Estimate

UNSHARDED = "PPO refuses to be sharded, and is planned without; run it apart, with another launch file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan` to `parser`; what it does not know are options of the recipes."""
    parser.set_defaults(overrides=[])
    parser.add_argument("recipe", type=Path, help="folder of YAML files, or the name of one such as pocket")
    parser.add_argument("--num_processes", type=int, help="processes, one for each GPU (default: the launch file's)")
    parser.add_argument("--config_file", help="launch file of accelerate (default: as for `run`)")
    parser.add_argument("--gpu", help="kind of GPU, such as h100 (default: measure this machine)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of a GPU's peak that training reaches (0.4)")
    parser.add_argument("--price", type=float, help="price of a GPU for an hour")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.usage = "%(prog)s recipe [options] [--FIELD VALUE ...]"


def main(args: argparse.Namespace) -> int:
    """Print what each stage of a recipe folder takes. Return 0, whether or not it fits.

    Raises:
        UserError: If the folder, an argument or an option is wrong, or a number that the estimate needs is not known.
    """
    from pipeline.launch import quiet_libraries
    from pipeline.training.estimate import PEAKS, gpu

    quiet_libraries()
    problems = []
    path = launch_file(args)
    if problem := check_launch_file(path):
        problems.append(problem)
    if args.gpu is not None and args.gpu.lower() not in PEAKS:
        problems.append(Problem("--gpu", args.gpu, f"is not known; choose from: {', '.join(PEAKS)}"))
    if not 0 < args.mfu <= 1:
        problems.append(Problem("--mfu", args.mfu, "must be above 0 and at most 1"))
    if args.num_processes is not None and args.num_processes < 1:
        problems.append(Problem("--num_processes", args.num_processes, "must be at least 1"))
    if args.price is not None and args.price < 0:
        problems.append(Problem("--price", args.price, "must not be negative"))
    if problems:
        raise UserError(*problems)
    launched = read_yaml(path)
    processes = args.num_processes or launched.get("num_processes") or 1
    sharded = shards(path)
    steps = _override([step for step in read_plan(args.recipe).steps if step.kind in KINDS], args.overrides)
    if problems := check_steps([_without_rewards(step) for step in steps]):
        raise UserError(*problems)
    device = gpu(args.gpu.lower(), args.mfu) if args.gpu else None
    planned = list(_plan(steps, processes, sharded, device))
    if args.json:
        stages = {stage.name: stage.to_json(processes, args.price) for stage in planned}
        print(json.dumps({"stages": stages, "fits": all(stage.fits for stage in planned)}, indent=2))
    else:
        _show(planned, processes, args)
    return 0


def _override(steps: Sequence[Step], words: Sequence[str]) -> list[Step]:
    """Return the steps with the options of a command line, each in all steps that know it.

    Raises:
        UserError: If no step knows an option, or a value is of the wrong type.
    """
    from pipeline.config.command_line import Parser, read_command_line
    from pipeline.config.parser import argument_types, field_types

    types = {step.name: argument_types(resolve_name(f"{KINDS[step.kind].module}:main")) for step in steps}
    hints = {name: field_types(*own) for name, own in types.items()}
    options: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            options.append(word.split("=", 1))
        elif options:
            options[-1].append(word)
        else:
            raise UserError(Problem("command line", word, "does not belong to any option; see --help"))
    known = {name for fields in hints.values() for name in fields}
    names = {option[0]: option[0][2:].replace("-", "_") for option in options}
    problems = [unknown_field(name, "", known) for name in names.values() if name not in known]
    changed = []
    for step in steps:
        own = [word for option in options if names[option[0]] in hints[step.name] for word in option]
        values, more = read_command_line(Parser(types[step.name]), own, hints[step.name]) if own else ({}, [])
        problems += more
        changed.append(dataclasses.replace(step, values={**step.values, **values}))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return changed


def _without_rewards(step: Step) -> Step:
    """Return the step without its reward functions, which may need packages that this machine lacks."""
    return dataclasses.replace(step, values={k: v for k, v in step.values.items() if k != "reward_funcs"})


@dataclass(frozen=True)
class Stage:
    """A stage and what it takes.

    Attributes:
        name: Directory that it writes.
        estimate: What it takes.
        device: On which it was planned.
        advice: What makes it fit or run; "" if it does.
    """

    name: str
    estimate: Estimate
    device: Device
    advice: str

    @property
    def fits(self) -> bool:
        """Whether its memory suffices."""
        return self.estimate.total <= self.device.memory

    def to_json(self, processes: int, price: float | None) -> dict[str, Any]:
        """Return what `--json` prints about it; `cost` is null without a price."""
        hours = self.estimate.seconds / 3600
        return {
            "parameters": self.estimate.parameters,
            "tokens": round(self.estimate.tokens),
            "flops": self.estimate.flops,
            "memory_bytes": {
                **{part: round(size) for part, size in self.estimate.memory.items()},
                "total": round(self.estimate.total),
            },
            "disk_bytes": round(self.estimate.disk),
            "hours": hours,
            "cost": None if price is None else hours * processes * price,
            "fits": self.fits,
            "advice": self.advice,
        }


def _plan(steps: Sequence[Step], processes: int, sharded: bool, device: Device | None) -> Iterator[Stage]:
    """Estimate each stage, on `device` or, without one, on this machine."""
    from pipeline import hardware
    from pipeline.config.parser import argument_types
    from pipeline.training.calibration import this_machine
    from pipeline.training.estimate import FULL, advice, estimate, fits
    from pipeline.training.workload import Settings, optimizer, pairs, starting_model, workload

    imports = time.process_time()  # this command has imported what the stages import, and done little else
    made: dict[str, Any] = {}  # by the folder that the step writes
    for step in steps:
        settings = Settings(step.kind, step.values, argument_types(resolve_name(f"{KINDS[step.kind].module}:main")))
        if step.kind == "tokenizer":
            made[settings["output_dir"]] = settings["vocab_size"]
        elif step.kind == "votes":
            made[settings["output_dir"]] = settings["min_votes"]
        elif step.kind not in ("data", "random"):
            try:
                model = starting_model(settings, made)
                work = workload(settings, model, made, processes, sharded and step.kind != "ppo")
                full = step.values.get("bf16") is False and not step.values.get("fp16")
                if device:
                    here = dataclasses.replace(device, mixed=FULL) if full else device
                else:
                    dtype = "fp32" if full else hardware.precision().value
                    here = this_machine(work, step.kind, partial(optimizer, settings), imports, dtype)
                made[settings["output_dir"]] = pairs(settings) if step.kind == "preferences" else model
                advised = [UNSHARDED] if sharded and step.kind == "ppo" else []
                advised += [advice(work, here)] if not fits(work, here) else []
                yield Stage(step.output.name, estimate(work, here), here, "; ".join(advised))
            except UserError as error:
                named = (dataclasses.replace(p, field=f"{step.name}: {p.field}") for p in error.problems)
                raise UserError(*named) from None


def _show(stages: Sequence[Stage], processes: int, args: argparse.Namespace) -> None:
    """Print a table of the stages, the memory of each by part, and what makes those fit that do not."""
    device = stages[0].device
    print(f"{args.recipe} on {processes} x {device.name}, {device.memory / 1e9:.0f} GB each")
    entries = {stage.name: stage.to_json(processes, args.price) for stage in stages}
    rows: list[tuple[str, ...]] = [("stage", "parameters", "tokens", "FLOPs", "GB", "disk GB", "hours", "cost")]
    for name, entry in entries.items():
        numbers = (_short(entry["parameters"]), _short(entry["tokens"]), f"{entry['flops']:.2g}")
        sizes = (f"{entry['memory_bytes']['total'] / 1e9:.2f}", f"{entry['disk_bytes'] / 1e9:.2f}")
        rows.append((name, *numbers, *sizes, _short(entry["hours"]), f"{entry['cost'] or 0:.2f}"))
    disk, hours, cost = (sum(entry[key] or 0 for entry in entries.values()) for key in ("disk_bytes", "hours", "cost"))
    rows.append(("in all", "", "", "", "", f"{disk / 1e9:.2f}", _short(hours), f"{cost:.2f}"))
    if args.price is None:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *row in rows:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, row, widths[1:])]))
    print("GB of one process, by part:")
    for name, entry in entries.items():
        parts = (f"{part} {size / 1e9:.2f}" for part, size in entry["memory_bytes"].items() if size and part != "total")
        print(f"{name.ljust(widths[0])}  {', '.join(parts)}")
    for stage in stages:
        if stage.advice:
            found = "" if stage.fits else f" does not fit: {stage.estimate.total / 1e9:.0f} GB; "
            print(f"{stage.name}{found or ': '}{stage.advice}")


def _short(number: float) -> str:
    """Return a number of parameters, tokens or hours in three digits: 135M, 2.7B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
