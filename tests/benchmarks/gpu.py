"""
# What a machine with GPUs must show first

```bash
python -m tests.benchmarks.gpu --list
python -m tests.benchmarks.gpu --output runs/gpu            # all checks for which this machine suffices
python -m tests.benchmarks.gpu --output runs/gpu kernels    # some of them, again
```

Prints what was expected beside what was measured, and stops at the first difference. The same command then goes on with
the check that differed: `checks.json` in the folder knows which ones passed, on GPUs and on a CPU. Logs of the programs
that the checks start lie beside it. The figures of a CPU, with which those of a GPU are compared, are measured by the
same command, once, in `cpu/`; a folder of an earlier run on pocket (`--run`) saves training its models there.

On a machine without a GPU, the checks that a CPU can take run on miniatures (as with `--quick`), to try the command.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from pipeline.launch import quiet_libraries
from tests.benchmarks.gpu_bench import (
    CPU,
    ROOT,
    TRAINED,
    Bench,
    Failed,
    Line,
    apart,
    at_least,
    at_most,
    contains,
    equal,
    furthest,
    history,
    kill_and_resume,
    launcher,
)

FLOAT32 = {"NVIDIA_TF32_OVERRIDE": "0"}
LAUNCH_FILES = ROOT / "recipes" / "accelerate"
GIB = 2**30


# ---- The checks, in the order of the list. Each yields its figures.


def one_gpu(bench: Bench) -> Iterator[Line]:
    """One process is one GPU: its batch is not multiplied by the number of GPUs."""
    _, log = bench.train("pretrain", "one", "--max_steps", 2)
    yield contains("batch", log, "batch       4 sequences = 4 x 1 accumulated x 1 process(es)")
    expected = f"one of {bench.gpus} GPUs" if bench.gpus > 1 else "processes   1 on"
    measured = next(line for line in log.splitlines() if line.startswith("processes"))
    yield Line("GPUs", expected, measured, expected in log)


def kernels(bench: Bench) -> Iterator[Line]:
    """FlashAttention reads each document alone, and the tests of models, rollouts and evaluation pass."""
    if bench.gpus:
        for heads, fault in bench.measure("kernels").items():
            yield equal(f"fault of FlashAttention with {heads} key and value heads", fault, None)
    tests = (
        ["tests/models/kernels/test_token_trees.py"]
        if bench.quick
        else ["tests/models", "tests/rl", "tests/evaluation"]
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if bench.gpus else ""
    log = bench.python("pytest", "-m", "pytest", "-q", *tests, environment={"CUDA_VISIBLE_DEVICES": visible})
    yield equal("tests that failed", "failed" in log.splitlines()[-1], False)


def numbers(bench: Bench) -> Iterator[Line]:
    """The same numbers as on the CPU: log-probabilities, values, scores, samples, and six steps of PPO."""
    sizes = ("8", "2000") if bench.quick else ("64", "20000")
    run = bench.start()
    reference = bench.output / "numbers-cpu.pt"
    if not reference.exists():
        bench.measure("numbers-cpu", run, *sizes, environment=CPU)
    expected = torch.load(reference)
    found = bench.measure("numbers", run, *sizes, environment=FLOAT32)
    for name, reference_values in expected["float32"].items():
        error = (found["float32"][name] - reference_values).abs()
        yield at_most(f"{name} in float32, largest difference", float(error.max()), 1e-4)
        error = (found["bf16"][name] - reference_values).abs()
        yield at_most(f"{name} under bf16 autocast, largest difference", float(error.max()), 0.05)
        yield at_most(f"{name} under bf16 autocast, mean difference", float(error.mean()), 5e-3)
    yield at_least("greedy answers that equal those of model.generate, share", found["greedy"], 1.0)
    yield at_least("p of the chi-square test of sampled tokens", found["p_of_draws"], 1e-3)
    options = ("ppo", *bench.options("ppo")[2:], "--bf16", "false", "--output_dir")
    folders = [bench.folder(f"ppo-fixed-{name}") for name in ("cpu", "gpu")]
    for folder, environment in zip(folders, (CPU, FLOAT32), strict=True):
        bench.python(folder.name, "-m", "tests.helpers.fixed_rollouts", *options, folder, environment=environment)
    yield at_most("weights after six steps of PPO on fixed rollouts, largest difference", apart(*folders), 1e-4)


def whole_path(bench: Bench) -> Iterator[Line]:
    """Pocket keeps its promises with three seeds; PPO and GRPO resume after kill -9."""
    folder = bench.output / "pocket"
    options = ["--output_dir", folder, "--plain", *(["--smoke"] if bench.quick else ["--seeds", 0, 1, 2])]
    log = bench.python("pocket", "-m", "pipeline", "run", "recipes/pocket", *options)
    yield equal("alarms", "alarm" in log, False)
    for run in () if bench.quick else sorted(folder.glob("seed*")):
        promises = json.loads((run / "report" / "metrics.json").read_text())["promises"]
        broken = [promise["promise"] for promise in promises if not promise["kept"]]
        yield equal(f"promises that {run.name} breaks, of {len(promises)}", broken, [])
    for recipe in ("ppo", "grpo"):
        options = ["--max_steps", 12, "--save_steps", 2, "--save_total_limit", 20]
        whole, _ = bench.train(recipe, "whole", *options)
        killed, _, log = kill_and_resume(bench, recipe, "killed", options)
        yield contains(f"{recipe} after kill -9", log, "resuming")
        difference = max(abs(a - b) for a, b in zip(history(whole, "reward"), history(killed, "reward"), strict=True))
        yield at_most(f"{recipe} after kill -9, largest difference of a reward", difference, 0.02)


def speed(bench: Bench) -> Iterator[Line]:
    """Pretraining at the shape of SmolLM2-135M: loss, tokens a second and recompilations of four ways to compute it."""
    steps = [
        "--max_steps",
        60,
        "--warmup_steps",
        5,
        "--gradient_accumulation_steps",
        1,
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
    ]
    bench.python("small", "-m", "pipeline", "run", "recipes/small", "--until", "0_tokenizer", "--plain")
    losses, tokens = [], {}
    for attention in ("varlen", "sdpa"):
        for compiled in ("true", "false"):
            folder = bench.folder(f"speed-{attention}-{compiled}")
            own = ["--torch_compile", compiled, *(["--attn_implementation", "sdpa"] if attention == "sdpa" else [])]
            command = ["-m", "recipes.pretrain", "--config", "recipes/small/1_pretrain.yaml", *steps, *own]
            command += ["--output_dir", folder]
            log = bench.python(folder.name, *command, environment={"TORCH_LOGS": "recompiles"})
            yield contains(f"attention, asked for {attention}", log, f"attention   {attention}")
            yield at_most(f"recompilations of {folder.name}", log.count("Recompiling function"), 2)
            losses.append(history(folder)[-1])
            tokens[attention, compiled] = history(folder, "tokens_per_second")[-1]
    yield at_most("spread of the four losses at step 60", max(losses) - min(losses), 0.02)
    yield at_least("tokens a second, FlashAttention compiled (H100)", tokens["varlen", "true"], 300_000)
    yield at_most("of that, with a mask", tokens["sdpa", "true"] / tokens["varlen", "true"], 0.7)


def real_vocabulary(bench: Bench) -> Iterator[Line]:
    """Scoring conversations with 151,936 tokens needs little memory; LoRA goes through all stages of existing-model."""
    yield at_most("GiB beside the weights", bench.measure("memory")["bytes"] / GIB, 6)
    folder = bench.output / "existing-model"
    bench.python("existing-model", "-m", "pipeline", "run", "recipes/existing-model", "--output_dir", folder, "--plain")
    yield equal("existing-model to the end", (folder / "report" / "metrics.json").is_file(), True)


def vllm(bench: Bench) -> Iterator[Line]:
    """vLLM samples from the policy that is trained, also with an adapter, whose frozen weights keep their bits."""
    run = bench.start()
    for recipe, stage in (("ppo", "3_ppo"), ("grpo", "4_grpo")):
        options = ["--config", f"recipes/pocket/{stage}.yaml", "--model_name_or_path", run / "2_sft"]
        options += ["--dataset_name", run / "data", "--max_steps", 6, "--logging_steps", 1]
        options += ["--use_vllm", "--vllm_gpu_memory_utilization", 0.3]
        if recipe == "ppo":
            options += ["--reward_model_path", run / "3_reward"]
        for lora in ([], ["--use_peft", "--lora_target_modules", "q_proj"]):
            folder = bench.folder(f"vllm-{recipe}{'-lora' if lora else ''}")
            found = bench.measure(f"frozen-{folder.name}", recipe, *options, *lora, "--output_dir", folder)
            ratios = history(folder, "sampling/importance_sampling_ratio/mean")
            yield at_most(f"{folder.name}: ratio of probabilities, from 1", max(abs(r - 1) for r in ratios), 0.02)
            smallest = min(history(folder, "sampling/importance_sampling_ratio/min"))
            yield at_least(f"{folder.name}: smallest ratio, so that no sequence is masked", smallest, 0.3)
            differences = history(folder, "sampling/sampling_logp_difference/mean")
            yield at_most(f"{folder.name}: mean difference of log-probabilities", max(differences), 0.02)
            yield equal(f"{folder.name}: frozen weights are the same", found["same"], True)
            if lora:
                allowed = (found["adapted_bytes"] + GIB) / GIB
                yield at_most(f"{folder.name}: growth in GiB", found["grown_bytes"] / GIB, allowed)
    correct = []
    for name, more in (("vllm", ["--vllm"]), ("without", [])):
        bench.python(f"evaluate-{name}", "-m", "pipeline", "evaluate", run, "--stage", "2_sft", "--name", name, *more)
        measured = json.loads((run / "evaluations" / name / "2_sft.json").read_text())
        correct.append(measured["metrics"]["pass@1"]["value"])
    yield at_most("pass@1 of 2_sft, from that without vLLM", abs(correct[0] - correct[1]), 0.03)


def two_processes(bench: Bench) -> Iterator[Line]:
    """Two processes with half the rows train as one, from a stream too; adapters pass from stage to stage."""
    options: list[object] = ["--bf16", "false"]
    stream = [*options, "--dataset_streaming"]
    rows = "--per_device_train_batch_size"
    for recipe, name, own in (*((recipe, "rows", options) for recipe in TRAINED), ("pretrain", "stream", stream)):
        one, _ = bench.train(recipe, f"{name}-1", *own, rows, 8, environment=FLOAT32)
        two, _ = bench.train(recipe, f"{name}-2", *own, rows, 4, processes=2, environment=FLOAT32)
        yield at_most(
            f"{recipe}, {name}: largest relative difference of a loss", furthest(history(two), history(one)), 1e-4
        )
    resume = ["--resume_from_checkpoint", two / "checkpoint-6"]
    again, _ = bench.train("pretrain", "stream-again", *stream, *resume, rows, 8, environment=FLOAT32)
    yield at_most("the stream of two, resumed by one: the same", furthest(history(again), history(one)), 1e-4)
    for recipe in ("ppo", "grpo"):
        folders = [bench.folder(f"{recipe}-fixed-{n}") for n in (1, 2)]
        for n, folder in zip((1, 2), folders, strict=True):
            command = [*launcher("accelerate_config.yaml", n), "-m", "tests.helpers.fixed_rollouts", recipe]
            command += [*bench.options(recipe)[2:], *options, rows, 4 // n, "--output_dir", folder]
            bench.python(folder.name, *command, environment=FLOAT32)
        yield at_most(f"{recipe} on fixed rollouts, largest difference of a weight", apart(*folders), 1e-4)
    lora = [*options, "--use_peft", "--lora_target_modules", "q_proj", rows, 2]
    adapter, _ = bench.train("sft", "lora", *lora, processes=2)
    _, log = bench.train("reward", "lora", *lora, "--model_name_or_path", adapter, processes=2)
    yield contains("a reward model from an adapter", log, f"model       the adapter {adapter}, merged into")
    _, seconds, log = kill_and_resume(bench, "sft", "rank", ["--max_steps", 400, "--save_total_limit", 2], processes=2)
    yield at_most("seconds until the launcher ends after kill -9 of a rank", seconds, 40)
    yield contains("after kill -9 of a rank", log, "resuming")
    # Under DETAIL, torch 2.13 crashes where DistributedDataParallel wraps a model for gloo, whatever the model.
    details = {"NCCL_DEBUG": "WARN", "TORCH_DISTRIBUTED_DEBUG": "DETAIL" if bench.gpus else "INFO"}
    _, log = bench.train("ppo", "details", *options, rows, 2, processes=2, environment=details)
    yield equal("unused parameters or mismatched collectives", "unused" in log or "mismatch" in log.lower(), False)


def sharding(bench: Bench) -> Iterator[Line]:
    """FSDP 2 and ZeRO-3 are active, with one process too, train as DDP does, save whole models, and resume."""
    kinds = [("fsdp2", "FSDP 2"), *([("zero3", "DeepSpeed ZeRO stage 3")] if find_spec("deepspeed") else [])]
    steps: list[object] = ["--max_steps", 20, "--save_steps", 10, "--per_device_train_batch_size", 2, "--bf16", "true"]
    for recipe in (*TRAINED, "grpo"):
        plain, _ = bench.train(recipe, "ddp", *steps, processes=2)
        for file, kind in kinds:
            options = {"processes": 2, "file": str(LAUNCH_FILES / f"{file}.yaml")}
            folder, log = bench.train(recipe, file, *steps, **options)
            yield contains(f"{recipe}, {file}", log, f"sharding    {kind}")
            yield at_most(f"{recipe}, {file}: loss, from that of DDP", furthest(history(folder), history(plain)), 2e-2)
            again, log = bench.train(
                recipe, f"{file}-again", *steps, "--resume_from_checkpoint", folder / "checkpoint-10", **options
            )
            later = [history(each)[10:] for each in (again, folder)]
            yield at_most(f"{recipe}, {file}: steps 11 to 20 when resumed, from the first run", furthest(*later), 1e-2)
            if recipe != "grpo":
                yield at_most(f"{recipe}, {file}: saved weights, from those of DDP", apart(plain, folder), 2e-2)
    for file, kind in kinds:
        path = str(LAUNCH_FILES / f"{file}.yaml")
        _, log = bench.train("sft", f"{file}-one", *steps, file=path)
        yield contains(f"{file} with one process", log, f"sharding    {kind}")
        _, log = bench.train("ppo", file, processes=2, file=path, fails=True)
        yield contains(f"PPO with {file}", log, "distributed_type: ")


def fp16(bench: Bench) -> Iterator[Line]:
    """SFT, PPO and GRPO in fp16, as GPUs without bfloat16 train: nothing becomes NaN, few steps are skipped."""
    for recipe in ("sft", "ppo", "grpo"):
        options = ["--value_warmup_steps", 2] if recipe == "ppo" else []
        folder, log = bench.train(recipe, "fp16", "--max_steps", 40, "--bf16", "false", "--fp16", "true", *options)
        yield contains(recipe, log, "precision   fp16 mixed")
        norms = history(folder, "grad_norm")
        yield at_most(f"{recipe}: share of steps skipped", sum(not math.isfinite(n) for n in norms) / len(norms), 0.05)
        yield equal(f"{recipe}: losses are finite", all(map(math.isfinite, history(folder))), True)


def experts(bench: Bench) -> Iterator[Line]:
    """Counting which experts take which tokens costs little time."""
    run, seconds = bench.start(), {}
    config = "recipes/pocket-llama4/1_pretrain.yaml"
    steps = 4 if bench.quick else 100
    data = ["--tokenizer_name_or_path", run / "tokenizer", "--dataset_name", run / "data"]
    if bench.quick:
        data = [*bench.options("pretrain")[2:6], "--dataset_config", "null"]
    # The first two runs warm up.
    for counted in ("yes", "no", "yes", "no"):
        folder = bench.folder(f"experts-{counted}")
        own = ["--config", config, *data, "--max_steps", steps, "--eval_strategy", "no", "--save_strategy", "no"]
        found = bench.measure(f"experts-{counted}", counted, *own, "--logging_steps", 10, "--output_dir", folder)
        seconds[counted] = found["seconds"]
    yield at_most("seconds, of those without counting", seconds["yes"] / seconds["no"], 1.3)


@dataclass(frozen=True)
class Check:
    """A check, and what it needs: GPUs, packages, the Hub. `on_cpu`: whether a CPU can try it."""

    run: Callable[[Bench], Iterator[Line]]
    gpus: int
    on_cpu: bool = False
    package: str = ""
    hub: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def needs(self) -> str:
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}" + (" (or a CPU, to try it)" if self.on_cpu else "")
        return ", ".join(filter(None, [gpus, self.package, "the Hub" if self.hub else ""]))

    def lacks(self, gpus: int) -> bool:
        """Return whether a machine does not suffice."""
        enough = gpus >= self.gpus or (gpus == 0 and self.on_cpu)
        return not enough or (bool(self.package) and find_spec(self.package) is None)


CHECKS = (
    Check(one_gpu, 2, on_cpu=True),
    Check(kernels, 1, on_cpu=True),
    Check(numbers, 1, on_cpu=True),
    Check(whole_path, 1, on_cpu=True),
    Check(speed, 1, hub=True),
    Check(real_vocabulary, 1, hub=True),
    Check(vllm, 1, package="vllm"),
    Check(two_processes, 2, on_cpu=True),
    Check(sharding, 2),
    Check(fp16, 1),
    Check(experts, 1, on_cpu=True),
)


def run_checks(bench: Bench, checks: Sequence[Check], names: Sequence[str] = ()) -> int:
    """Run the checks that did not pass yet, or the wanted ones, up to the first that differs. Return the exit code."""
    bench.output.mkdir(parents=True, exist_ok=True)
    file, device = bench.output / "checks.json", "gpu" if bench.gpus else "cpu"
    state = json.loads(file.read_text()) if file.exists() else {}
    passed = state.setdefault(device, {})
    for check in checks:
        if (names and check.name not in names) or (not names and check.name in passed):
            continue
        if check.lacks(bench.gpus):
            print(f"\n{check.name}: left for a machine with {check.needs}")
            continue
        print(f"\n{check.name}: {check.run.__doc__}", flush=True)
        began, lines = time.monotonic(), []
        try:
            for line in check.run(bench):
                lines.append(line)
                sign = "ok     " if line.agrees else "DIFFERS"
                print(f"  {sign} {line.what}\n          expected {line.expected}, measured {line.measured}", flush=True)
                if not line.agrees:
                    break
        except Failed as error:
            print(f"  FAILED {error}")
            lines.append(Line("it runs", "exit code 0", str(error), agrees=False))
        if not all(line.agrees for line in lines):
            passed.pop(check.name, None)
            print(f"\nstopped at {check.name}; mend it, and run the same command again")
        else:
            passed[check.name] = {line.what: line.measured for line in lines}
            passed[check.name]["seconds"] = round(time.monotonic() - began)
        file.write_text(json.dumps(state, indent=2) + "\n")
        if check.name not in passed:
            return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checks", nargs="*", metavar="CHECK", help="only these, also if they have passed (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="print the checks and what they need, and stop")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--run", type=Path, help="a run on recipes/pocket, made on a CPU")
    parser.add_argument("--quick", action="store_true", help="miniatures, as on a CPU")
    args = parser.parse_args(argv)
    if unknown := set(args.checks) - {check.name for check in CHECKS}:
        parser.error(f"unknown checks: {', '.join(sorted(unknown))}; see --list")
    if args.list:
        for check in CHECKS:
            print(f"{check.name:16} {check.run.__doc__}\n{'':16} needs {check.needs}")
        return 0
    quiet_libraries()
    gpus = torch.cuda.device_count()
    bench = Bench(args.output.absolute(), gpus, args.quick or not gpus, args.run and args.run.absolute())
    return run_checks(bench, CHECKS, args.checks)


if __name__ == "__main__":
    sys.exit(main())
