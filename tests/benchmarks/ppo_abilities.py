"""
# What TRL 1.12's `PPOTrainer` cannot do, and `pipeline.rl.ppo.PPOTrainer` can

```bash
python -m tests.benchmarks.ppo_abilities --run runs/pocket
```

Asks both for the same, each time in a new process (two for `processes`), on two rollouts of the run's models, and
examines the result:

- `resume`: does a run resumed after the first rollout end with the weights of an undisturbed run?
- `processes`: do two processes train together, and save a policy that loads?
- `critic`: is the critic saved, and does it load?
- `clipping`: under SGD with learning rate 1, do policy and critic move by no more than `max_grad_norm`?
- `evaluation`: does `eval_strategy` lead to metrics on the evaluation prompts?
- `bf16`: does the policy compute in bfloat16 with `bf16=True`?

Prints a table with what was observed, and writes OUTPUT/results.json. Takes about a minute.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.ppo_vs_trl import build_ours, build_trl, install_trl
from tests.benchmarks.side_by_side import ROOT

BUILDERS = {"trl": build_trl, "ours": build_ours}
ROLLOUTS = 2
CLIP = 1e-3
"""`max_grad_norm` in the check of clipping."""

Answer = tuple[bool, str]
"""Whether the trainer is able to, and what was observed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/pocket"), help="run with 2_sft, 3_reward and data")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/ppo_abilities"))
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--trainer", choices=BUILDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        able, seen = CHECKS[args.check](args)
        print("\n" + json.dumps({"able": able, "seen": seen}))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Ask both for everything, and print the answers."""
    environment = install_trl(args.output / "environment")
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':12}{'TRL 1.12':10}{'ours':6}")
    for check in CHECKS:
        results[check] = {trainer: ask(args, check, trainer, environment) for trainer in BUILDERS}
        shown = {trainer: "yes" if answer["able"] else "no" for trainer, answer in results[check].items()}
        print(f"{check:12}{shown['trl']:10}{shown['ours']:6}")
        for answer in results[check].values():
            print(f"{'':12}{answer['seen']}")
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def ask(args: argparse.Namespace, check: str, trainer: str, environment: Path) -> dict[str, Any]:
    """Return the answer of a process, or its error."""
    folder = args.output / trainer / check
    module = ["-m", "tests.benchmarks.ppo_abilities", "--run", str(args.run.resolve()), "--output", str(folder)]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *(launch if check == "processes" else []), *module]
    path = [str(environment)] if trainer == "trl" else []
    done = subprocess.run(
        [*command, "--check", check, "--trainer", trainer],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"able"')]
    if done.returncode == 0 and answers:
        answer: dict[str, Any] = json.loads(answers[0])
        return answer
    said = re.sub(r"^\[rank\d+\]: ", "", done.stderr, flags=re.MULTILINE)
    errors = re.findall(r"^\w+Error: (?:.+|\n.+)", said, re.MULTILINE)
    seen = " ".join(errors[-1].split()) if errors else f"exit code {done.returncode}"
    return {"able": False, "seen": textwrap.shorten(seen, 110)}


def build(args: argparse.Namespace, folder: Path, rollouts: int = ROLLOUTS, **options: Any) -> Any:
    """Build the trainer that `args.trainer` names, for a few rollouts of 16 completions, each trained on once."""
    from pipeline import hardware

    if hardware.accelerator() is None:
        options = {"use_cpu": True} | options
    settings = {
        "run": args.run,
        "output": folder,
        "episodes": 16 * rollouts,
        "batch_size": 16,
        "epochs": 1,
        "learning_rate": 1e-4,
        "kl_coef": 0.05,
        "max_completion_length": 32,
        "seed": 0,
        "bf16": False,
    }
    return BUILDERS[args.trainer](argparse.Namespace(**settings | options.pop("settings", {})), **options)


def networks(trainer: Any) -> dict[str, Any]:
    """Policy and critic, without what several processes wrap them in."""
    if hasattr(trainer, "policy_model"):
        return {"policy": trainer.policy_model, "critic": trainer.value_model}
    unwrap = trainer.accelerator.unwrap_model
    return {"policy": unwrap(trainer.model), "critic": unwrap(trainer.value_model)}


def flat(network: Any) -> Any:
    """Return all weights in one vector."""
    import torch

    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def resume(args: argparse.Namespace) -> Answer:
    """Compare an undisturbed run with one that resumes from its first checkpoint, in one process."""
    import torch

    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = build(args, args.output / "whole", **saving)
    whole.train()
    checkpoint = args.output / "whole" / "checkpoint-1"
    parts = build(args, args.output / "parts", **saving)
    parts.train(resume_from_checkpoint=str(checkpoint))
    first, second = networks(whole), networks(parts)
    differing = [name for name in first if not torch.equal(flat(first[name]), flat(second[name]))]
    return not differing, f"other weights: {', '.join(differing)}" if differing else "the same weights, bit for bit"


def processes(args: argparse.Namespace) -> Answer:
    """Train on two processes."""
    trainer = build(args, args.output / "run", ddp_backend="gloo")
    trainer.train()
    trainer.save_model(str(args.output / "run"))
    number = trainer.accelerator.num_processes
    trainer.accelerator.wait_for_everyone()
    same = flat(loaded(args.output / "run", "AutoModelForCausalLM")).equal(flat(networks(trainer)["policy"]))
    return number == 2 and same, f"{number} processes; the policy saved is {'' if same else 'not '}the one trained"


def critic(args: argparse.Namespace) -> Answer:
    """Look for the critic's weights in what a run saves."""
    trainer = build(args, args.output / "run", save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(args.output / "run"))
    folder = args.output / "run" / "value_model"
    if not folder.is_dir():
        left = sorted({path.name for path in (args.output / "run").rglob("*.safetensors")})
        return False, f"no critic among {', '.join(left)}"
    saved = loaded(folder, "AutoModelForTokenClassification")
    same = flat(saved).equal(flat(networks(trainer)["critic"]))
    return same, f"the critic saved is {'' if same else 'not '}the one trained"


def clipping(args: argparse.Namespace) -> Answer:
    """Measure the clipped gradient: under SGD with learning rate 1, the weights move by it."""
    trainer = build(
        args, args.output / "run", rollouts=1, optim="sgd", max_grad_norm=CLIP, settings={"learning_rate": 1.0}
    )
    before = {name: flat(network).clone() for name, network in networks(trainer).items()}
    trainer.train()
    moved = {name: float((flat(network) - before[name]).norm()) for name, network in networks(trainer).items()}
    within = all(0 < distance < 1.01 * CLIP for distance in moved.values())
    return within, f"with {CLIP:g}, " + " and ".join(f"the {name} moved by {moved[name]:.2g}" for name in moved)


def evaluation(args: argparse.Namespace) -> Answer:
    """Look for metrics on the evaluation prompts."""
    trainer = build(args, args.output / "run", eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    trainer.train()
    measured = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    rewards = [f"{name} {entry[name]:.3f}" for entry in measured for name in ("eval_reward",) if name in entry]
    return bool(measured), f"{len(measured)} evaluations {', '.join(rewards)}".strip()


def bf16(args: argparse.Namespace) -> Answer:
    """Record the dtype of the policy's layers during training."""
    import torch

    trainer = build(args, args.output / "run", rollouts=1, settings={"bf16": True})
    seen = set()

    def note(module: Any, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            seen.add(str(output.dtype))

    networks(trainer)["policy"].model.layers[0].mlp.register_forward_hook(note)
    trainer.train()
    return seen == {"torch.bfloat16"}, f"computes in {', '.join(sorted(seen))}"


def loaded(folder: Path, kind: str) -> Any:
    """Load a model as a user would."""
    import transformers

    return getattr(transformers, kind).from_pretrained(folder)


CHECKS: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "resume": resume,
    "processes": processes,
    "critic": critic,
    "clipping": clipping,
    "evaluation": evaluation,
    "bf16": bf16,
}

if __name__ == "__main__":
    main()
