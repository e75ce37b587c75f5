"""
# Where the seconds of a run go, also on a slower machine

```bash
python -m tests.benchmarks.run_profile --run runs/pocket
python -m tests.benchmarks.run_profile --run runs/pocket --machines native avx2
```

Reads a finished run. For each step, prints the seconds that `run.json` counts and, of a step that trains, what the log
of its trainer attributes: updates with the checkpoints between them, held-out evaluations, and the rest, which is
starting, loading and saving the model. Of a step that was resumed, the log has the last part alone.

With `--machines`, some updates of each training stage, and an evaluation of few rows, are run again on what the run has
left, each machine in a process of its own: `native` is this machine, `avx2` the same without AVX-512, AMX and bfloat16.
Prints milliseconds and tokens per second, and the operators that take longest by torch's profiler (their own time, as a
share of all operators' time), in updates after the ones that are timed. What the emulation cannot show:

- Clock, caches, memory and the width of the units stay this machine's. A processor that has AVX2 alone is often older,
  and slower by another factor, which is not the same for products and for what is bound by memory.
- Libraries that choose their kernels by themselves do so by the real processor: tokenizers, numpy, Python.
- The estimate that decides about `torch.compile` measures the emulated products; what it compiles may use AVX-512.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COLUMNS = ("seconds", "updates", "evaluation", "rest", "ms/update", "tokens/s")

MACHINES = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""Environment variables by which torch, oneDNN and MKL choose their kernels."""
LACKING = ("avx512", "amx", "avx10", "avx_vnni", "avx_ne", "bf16")
"""How the capabilities begin that a machine with AVX2 alone lacks."""
WARM_UP, TIMED, PROFILED = 4, 8, 4
"""Updates: PPO samples for four at a time, GRPO for two."""
STEPS = {
    "1_pretrain": "recipes.pretrain",
    "2_sft": "recipes.sft",
    "3_reward": "recipes.reward",
    "3_ppo": "recipes.ppo",
    "4_grpo": "recipes.grpo",
}
INPUTS = {
    "dataset_name": {"3_reward": "3_preferences", "": "data"},
    "tokenizer_name_or_path": {"1_pretrain": "tokenizer"},
    "model_name_or_path": {"2_sft": "1_pretrain", "3_reward": "2_sft", "3_ppo": "2_sft", "4_grpo": "3_ppo"},
    "reward_model_path": {"3_ppo": "3_reward"},
}
"""Option -> stage -> folder of the run that it names; "" stands for all other stages."""
EVALUATION = "evaluate_2_sft"
ROWS = 32
"""Rows of each metric in the evaluation."""


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/pocket"), help="folder with run.json")
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=[], help="run some updates again on these")
    stages = [*STEPS, EVALUATION]
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, help="which of them")
    parser.add_argument("--operators", type=int, default=5, help="how many to name")
    args = parser.parse_args()
    if args.machines:
        compare_machines(args.run.resolve(), args.machines, args.stages, args.operators)
    else:
        show_run(args.run)


def show_run(run: Path) -> None:
    """Print the seconds of each step of a finished run."""
    steps = json.loads((run / "run.json").read_text(encoding="utf-8"))["steps"]
    rows = {name: profile(entry["seconds"], run / name / "trainer_state.json") for name, entry in steps.items()}
    sums = {column: sum(row.get(column, 0.0) for row in rows.values()) for column in COLUMNS[:4]}
    width = max(map(len, rows))
    print(f"{'':{width}}" + "".join(f"{column:>12}" for column in COLUMNS) + f"{'share':>8}")
    for name, row in {**rows, "sum": sums}.items():
        cells = "".join(f"{f'{row[column]:,.1f}' if column in row else '':>12}" for column in COLUMNS)
        print(f"{name:{width}}{cells}{row['seconds'] / sums['seconds']:8.1%}")


def profile(seconds: float, state: Path) -> dict[str, float]:
    """Return the columns of a step.

    Args:
        seconds: What it took as a whole.
        state: State of its trainer; it need not exist.
    """
    row = {"seconds": seconds}
    if not state.is_file():
        return row | {"rest": seconds}
    content: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    history = content["log_history"]
    evaluation = sum(entry.get("eval_runtime", 0.0) for entry in history)
    training = history[-1]["train_runtime"] - evaluation
    row |= {"updates": training, "evaluation": evaluation, "rest": seconds - training - evaluation}
    row["ms/update"] = 1000 * training / content["global_step"]
    if tokens := content.get("num_input_tokens_seen"):
        row["tokens/s"] = tokens / training
    return row


def compare_machines(run: Path, machines: list[str], stages: list[str], operators: int) -> None:
    """Run some updates of each stage of a finished run on each machine, in turn, and print what they take."""
    with tempfile.TemporaryDirectory() as made:
        for name in stages:
            for machine in machines:
                row = measure(run, name, machine, Path(made))
                speed = f"{row['tokens/s']:10,.0f} tokens/s" if row.get("tokens/s") else ""
                print(f"{name:15} {machine:8} {row['precision']:5} {row['ms']:9,.1f} ms{speed}", flush=True)
                for operator, share in row["operators"][:operators]:
                    print(f"{'':17}{share:6.1%}  {operator}", flush=True)


def measure(run: Path, name: str, machine: str, made: Path) -> dict[str, Any]:
    """Run one stage on one machine in a new process, and return what `run_child` found."""
    result = made / f"{name} {machine}.json"
    if name in STEPS:
        command = [STEPS[name], "--config", str(ROOT / f"recipes/pocket/{name}.yaml")]
        for option, folders in INPUTS.items():
            if folder := folders.get(name, folders.get("")):
                command += [f"--{option}", str(run / folder)]
        command += ["--output_dir", str(made / f"{name}-{machine}"), "--save_strategy", "no", "--eval_strategy", "no"]
        updates = str(WARM_UP + TIMED + PROFILED)
        command += ["--max_steps", updates, "--warmup_steps", "2", "--logging_steps", str(WARM_UP)]
    else:
        command = ["pipeline", "evaluate", str(run), "--stage", name.removeprefix("evaluate_"), "--name", "profile"]
        command += ["--limit", str(ROWS)]
    environment = {key: value for key, value in os.environ.items() if key not in MACHINES["avx2"]}
    # torch keeps what it compiled, and does not notice that the kernels are for another machine.
    environment |= MACHINES[machine] | {"TORCHINDUCTOR_CACHE_DIR": str(made / f"compiled-{machine}")}
    command = [sys.executable, "-m", "tests.benchmarks.run_profile", "--child", machine, str(result), *command]
    pipe = subprocess.PIPE
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    if not result.exists():
        raise SystemExit(f"{name} failed on {machine}:\n{done.stdout[-3000:]}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def run_child(machine: str, result: str, module: str, *arguments: str) -> None:
    """Run a module on a machine, and write its speed and its operators to the file `result`."""
    import torch

    found = torch.cpu.get_capabilities
    if machine != "native":
        # `pipeline.hardware.precision` decides by this function, which does not follow the environment variables.
        lacking = {key: False for key, value in found().items() if isinstance(value, bool) and key.startswith(LACKING)}
        torch.cpu.get_capabilities = lambda: found() | lacking
    from pipeline.hardware import precision

    sys.argv = [module, *arguments]
    measured = measure_evaluation() if module == "pipeline" else measure_updates(module)
    Path(result).write_text(json.dumps({"precision": precision().value, **measured}), encoding="utf-8")


def measure_updates(module: str) -> dict[str, Any]:
    """Run a recipe. Return the milliseconds of an update, the tokens per second and the shares of the operators."""
    from transformers import TrainerCallback

    from pipeline.training import train

    updates: list[float] = []
    speeds: list[float] = []
    profiler = new_profiler()

    class Profile(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP + TIMED:
                profiler.start()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            updates.append(time.perf_counter() - self.start)
            if state.global_step == WARM_UP + TIMED + PROFILED:
                profiler.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "tokens_per_second" in (logs or {}):
                speeds.append(logs["tokens_per_second"])

    of_recipes: Callable[..., Any] = train.run_callbacks
    train.run_callbacks = lambda args: [*of_recipes(args), Profile()]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    timed = updates[WARM_UP : WARM_UP + TIMED]
    # The last log covers the profiled updates, and the first one those that warm up.
    speeds = speeds[1 : 1 + TIMED // WARM_UP]
    return {
        "ms": 1000 * sum(timed) / TIMED,
        "tokens/s": len(speeds) / sum(1 / speed for speed in speeds) if speeds else None,
        "operators": shares(profiler),
    }


def measure_evaluation() -> dict[str, Any]:
    """Evaluate twice, the second time under the profiler. Return the milliseconds and the shares of the operators."""
    from pipeline.__main__ import main as command

    start = time.perf_counter()
    command(sys.argv[1:])
    taken = time.perf_counter() - start
    with new_profiler() as profiler:
        command(sys.argv[1:])
    return {"ms": 1000 * taken, "operators": shares(profiler)}


def new_profiler() -> Any:
    """Return torch's profiler, which does not measure before it is started."""
    import torch

    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)


def shares(profiler: Any) -> list[tuple[str, float]]:
    """Return the operators and their shares of the time of all operators, those that take longest first."""
    events = [event for event in profiler.key_averages() if "ProfilerStep" not in event.key]
    whole = sum(event.self_cpu_time_total for event in events)
    events.sort(key=lambda event: -event.self_cpu_time_total)
    return [(f"{event.key} x {event.count:,}", event.self_cpu_time_total / whole) for event in events[:20]]


if __name__ == "__main__":
    main()
