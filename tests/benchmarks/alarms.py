"""
# Do the collapse alarms speak when a run breaks, and only then

```bash
python -m tests.benchmarks.alarms run FOLDER      # trains what FOLDER/runs.jsonl lacks, about ten minutes on two cores
python -m tests.benchmarks.alarms table FOLDER    # reads the logs again, without training
```

Holds `pipeline.rl.alarms` against 40 healthy and 40 broken runs of PPO and GRPO, in the world of
`tests.helpers.ten_words`. Each starts from a policy of its own, which has learned to answer with some of the words that
it was asked about, and to stop. PPO's rewards come from a reward model that learned them from examples, with its own
mistakes; GRPO's are checked. `KINDS` says how runs are broken. Whether one broke is measured apart from the alarms
(`broke`), on new answers of the first and the last policy, by what they were meant to learn rather than by what was
paid; a run that did not turn out as it was meant to is reported, and counts for neither side.

Each half has 20 healthy and 20 broken runs. Thresholds are chosen on the half `setting`, which has only three of the
six kinds: `table --half setting --set ENTROPY_SHARE=0.1` tries one. The half `judging` shows how good they are. Its
runs were not looked at before; its kinds were, in single runs with other seeds, when their recipes were made.

DPO samples nothing while it trains: every few steps, its policy answers, and the alarms read the figures that PPO would
log, with the scores of a reward model that DPO does not use. Its runs have rows of their own: alarms in 0 of 4 healthy
runs, and in all 4 with hardly any KL penalty, of which 2 broke.

The results; "after" is the median share of the run after which the first alarm spoke:

    run                                                        setting: alarms  after   judging: alarms  after
    healthy, of ten kinds, some of which learn all or little           0 of 20                 1 of 20    10%
    broken                                                            20 of 20    13%         19 of 20    20%
      learning rate far too high                                        7 of 7    13%           4 of 4    13%
      paid for never stopping                                           7 of 7    20%           3 of 3    23%
      problems that are all too hard                                    6 of 6    10%           3 of 3    10%
      reward model with a blind spot, hardly any KL penalty                                     4 of 4    25%
      paid for empty answers                                                                    3 of 3    20%
      paid for one sentence, whatever is asked                                                  2 of 3    40%

The false alarm is GRPO that found no right answer in its first steps, and learned later. The run without an alarm is
GRPO whose wrong reward was satisfied: to the alarms, it is success.
"""

import argparse
import copy
import fnmatch
import json
import logging
import random
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import GRPOConfig

from pipeline.errors import RunStopped
from pipeline.rl import alarms
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOConfig, PPOTrainer
from pipeline.rl.rewards import RewardModel
from pipeline.training.fine_tuning import DPOTrainer
from pipeline.training.preference_config import DPOConfig
from tests.helpers import ten_words as world

STEPS, BATCH, LOGGED = 60, 64, 2
"""Optimizer steps of a run, completions in each, and steps from one entry of the log to the next: PPO trains twice on
a rollout."""

MARGIN = 0.05
"""A run broke if its reward fell by more than this, or ended below it."""


# ---- Runs


@dataclass(frozen=True)
class Plan:
    """A run, before it is trained.

    Attributes:
        half: `setting`, `judging`, or `dpo`.
        kind: `healthy`, or what breaks it.
        number: Its place in the half, for its name and its seed.
        method: `ppo`, `grpo` or `dpo`.
        paid: The reward that it is trained on.
        judged: The reward that says whether it broke.
        options: Of the trainer's configuration.
    """

    half: str
    kind: str
    number: int
    method: str
    paid: str
    judged: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.half}-{self.kind}-{self.number}"


Recipe = tuple[str, str, str, dict[str, Any]]
HEALTHY: list[Recipe] = [
    ("ppo", "quality", "quality", {"learning_rate": 1e-3, "kl_coef": 0.05}),
    ("ppo", "quality", "quality", {"learning_rate": 3e-3, "kl_coef": 0.05}),
    ("ppo", "quality", "quality", {"learning_rate": 2e-3, "kl_coef": 0.2}),
    ("ppo", "quality", "quality", {"learning_rate": 2e-4, "kl_coef": 0.02}),
    ("grpo", "mentions", "mentions", {"learning_rate": 3e-4, "beta": 0.04}),
    ("grpo", "first", "first", {"learning_rate": 5e-3, "beta": 0.02}),
    ("grpo", "single", "single", {"learning_rate": 8e-3}),
    ("grpo", "brief", "brief", {"learning_rate": 1e-2, "num_generations": 16}),
    ("grpo", "repeat", "repeat", {"learning_rate": 5e-3}),
    ("grpo", "long", "long", {"learning_rate": 3e-3}),
]
KINDS: dict[str, list[Recipe]] = {
    "rate": [
        ("ppo", "quality", "quality", {"learning_rate": 0.5, "kl_coef": 0.05}),
        ("grpo", "mentions", "mentions", {"learning_rate": 0.5}),
    ],
    "endless": [
        ("ppo", "endless", "quality", {"learning_rate": 5e-3, "kl_coef": 0.01, "missing_eos_penalty": None}),
        ("grpo", "endless", "quality", {"learning_rate": 5e-3}),
    ],
    "hard": [
        ("grpo", "puzzle", "puzzle", {"learning_rate": 3e-3}),
        ("grpo", "puzzle", "puzzle", {"learning_rate": 3e-3, "beta": 0.04, "num_generations": 16}),
    ],
    "blind": [
        ("ppo", "blind", "quality", {"learning_rate": 8e-3, "kl_coef": 0.0}),
        ("ppo", "blind", "quality", {"learning_rate": 8e-3, "kl_coef": 1e-3}),
    ],
    "empty": [
        ("ppo", "empty", "quality", {"learning_rate": 5e-3, "kl_coef": 0.01}),
        ("grpo", "empty", "quality", {"learning_rate": 5e-3}),
    ],
    "fixed": [
        ("ppo", "fixed", "quality", {"learning_rate": 1e-2, "kl_coef": 1e-3}),
        ("grpo", "fixed", "quality", {"learning_rate": 1e-2}),
    ],
}
"""Far too high a learning rate; a reward for never stopping; problems that are all too hard; a reward model with a
blind spot and hardly any KL penalty; a reward for empty answers; a reward for one sentence."""
BROKEN = {
    "setting": {"rate": 7, "endless": 7, "hard": 6},
    "judging": {"rate": 4, "endless": 3, "hard": 3, "blind": 4, "empty": 3, "fixed": 3},
}
"""Runs of each kind in each half."""
DPO: dict[str, dict[str, Any]] = {
    "healthy": {"learning_rate": 5e-4, "beta": 0.2},
    "broken": {"learning_rate": 5e-2, "beta": 1e-3},
}


def plans() -> list[Plan]:
    """Return all runs. Each varies the learning rate of its recipe by up to a factor of 1.5."""
    listed = [("dpo", kind, ("dpo", "pairs", "quality", DPO[kind])) for kind in DPO for _ in range(4)]
    for half, kinds in BROKEN.items():
        listed += [(half, "healthy", recipe) for recipe in HEALTHY for _ in range(2)]
        listed += [(half, kind, KINDS[kind][i % len(KINDS[kind])]) for kind, runs in kinds.items() for i in range(runs)]
    made, numbers = [], Counter[str]()
    for half, kind, (method, paid, judged, options) in listed:
        numbers[half] += 1
        factor = 1.5 ** random.Random(f"{half} {numbers[half]}").uniform(-1, 1)
        varied = options | {"learning_rate": options["learning_rate"] * factor}
        made.append(Plan(half, kind, numbers[half], method, paid, judged, varied))
    return made


def broke(record: dict[str, Any]) -> bool:
    """Return whether a policy lost what it could do, learned nothing, or gives nearly everyone the same answer."""
    before, after = record["before"], record["after"]
    lost = after["reward"] < before["reward"] - MARGIN
    return lost or after["reward"] < MARGIN or after["most frequent"] > 0.5


class Checkpoints(TrainerCallback):
    """Measure a policy before its first step, and then every `every` steps, in entries of the log."""

    def __init__(self, reference: PreTrainedModel, judge: RewardModel, every: int = 4) -> None:
        self.reference, self.judge, self.every = reference, judge, every

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            measured = world.figures(kwargs["model"], self.reference, self.judge, args.seed)
            state.log_history.append({**measured, "step": state.global_step})


# ---- Training


def settings(plan: Plan, seed: int) -> dict[str, Any]:
    """Return the arguments of a configuration: one CPU process in fp32, nothing saved."""
    common = {
        "per_device_train_batch_size": BATCH, "max_steps": STEPS, "logging_steps": LOGGED, "seed": seed,
        "report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "lr_scheduler_type": "constant", "activation_checkpointing": False,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "ppo": {"max_completion_length": world.LIMIT, "num_iterations": 2, "missing_eos_penalty": 1.0},
        "grpo": {"max_completion_length": world.LIMIT, "num_generations": 8, "reward_weights": [1.0, 0.0]},
        "dpo": {},
    }
    return common | own[plan.method] | plan.options


def build(plan: Plan, policy: Any, seed: int, folder: str) -> Any:
    """Return the trainer of a run."""
    options = settings(plan, seed)
    if plan.method == "dpo":
        judge = RewardModel(world.reward_model("quality", plan.half), world.TOKENIZER, [world.END], {})
        watch = Checkpoints(copy.deepcopy(policy), judge)
        config, data = DPOConfig(folder, **options), world.pairs(policy, seed)
        return DPOTrainer(policy, config, train_dataset=data, processing_class=world.TOKENIZER, callbacks=[watch])
    if plan.method == "grpo":
        rewards = [world.as_function(plan.paid), world.as_function(plan.judged)]
        return GRPOTrainer(
            policy, rewards, GRPOConfig(folder, **options), world.questions(seed), processing_class=world.TOKENIZER
        )
    # Two reward models of a kind in each half.
    rewards = [world.reward_model(plan.paid, f"{plan.half} {plan.number % 2}"), world.as_function(plan.judged)]
    config = PPOConfig(folder, **options, reward_weights=[1.0, 0.0])
    return PPOTrainer(
        policy, rewards, config, world.questions(seed), processing_class=world.TOKENIZER,
        reward_processing_classes=[world.TOKENIZER, None],
    )  # fmt: skip


def train(plan: Plan) -> dict[str, Any]:
    """Train, and return the log with what became of the policy."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    seed = random.Random(plan.name).randrange(10**6)
    policy = world.tuned_policy(seed)
    before = world.outcome(policy, plan.judged, seed)
    stopped = ""
    with tempfile.TemporaryDirectory() as folder:
        # TRL loads references from where the policy came from.
        policy.save_pretrained(folder)
        trainer = build(plan, LlamaForCausalLM.from_pretrained(folder), seed, folder)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except (RunStopped, RuntimeError) as error:
            # A rate that is far too high may end in numbers that are not finite.
            stopped = str(error)
    log = [entry for entry in trainer.state.log_history if not any(name.startswith("alarm/") for name in entry)]
    if plan.method == "dpo":
        # DPO logs the entropy of the answers in its pairs, not of the policy's own.
        log = [entry for entry in log if "completions/mean_length" in entry]
    # Nothing can be sampled from weights that are not numbers.
    after = before | {"reward": 0.0} if stopped else world.outcome(trainer.model, plan.judged, seed)
    seconds = time.perf_counter() - start
    measured = {"before": before, "after": after, "stopped": stopped, "seconds": seconds, "log": log}
    return {"name": plan.name, **asdict(plan), **measured}


def run(folder: Path, only: str, processes: int) -> None:
    """Train what is not yet in FOLDER/runs.jsonl, and add it there."""
    folder.mkdir(parents=True, exist_ok=True)
    done = {record["name"] for record in load(folder)}
    left = [plan for plan in plans() if plan.name not in done and fnmatch.fnmatch(plan.name, only)]
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        (folder / "runs.jsonl").open("a") as file,
    ):
        for future in as_completed([pool.submit(train, plan) for plan in left]):
            record = future.result()
            print(json.dumps(record) + "\n", end="", file=file, flush=True)
            rewards = " -> ".join(f"{record[when]['reward']:.2f}" for when in ("before", "after"))
            print(f"{record['name']:24} {record['seconds']:5.1f} s  reward {rewards}", flush=True)


# ---- The table


def load(folder: Path) -> list[dict[str, Any]]:
    path = folder / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def replay(record: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the alarms that a log raises, each with the share of the run that it comes after."""
    watch = alarms.CollapseAlarms(checked=record["method"] == "grpo")
    state, control = TrainerState(), TrainerControl()
    state.max_steps = STEPS
    args: Any = SimpleNamespace(generation_batch_size=BATCH)
    watch.on_train_begin(args, state, control)
    for entry in record["log"]:
        state.global_step = entry["step"]
        watch.on_log(args, state, control, logs=entry)
    watch.on_train_end(args, state, control)
    named = [(name, entry["step"]) for entry in state.log_history for name in entry if name.startswith("alarm/")]
    return [(name.removeprefix("alarm/"), step / STEPS) for name, step in named]


def row(half: str, kind: str, records: list[dict[str, Any]]) -> str:
    """Return a line of the table, about the runs of a kind that turned out as they were made."""
    as_made = [record for record in records if broke(record) == (kind != "healthy")]
    raised = [heard for record in as_made if (heard := replay(record))]
    when = f"{statistics.median(heard[0][1] for heard in raised):.0%}" if raised else ""
    first = Counter(heard[0][0] for heard in raised).most_common()
    ever = Counter(name for heard in raised for name, _ in heard).most_common()
    firsts, evers = (", ".join(f"{name} {count}" for name, count in names) for names in (first, ever))
    counts = f"{len(as_made)} of {len(records)}", f"{len(raised)} of {len(as_made)}"
    return f"{half:8} {kind:8} {counts[0]:>9} {counts[1]:>9} {when:>6}  {firsts:40} {evers}"


def table(folder: Path, half: str | None) -> None:
    """Print how often alarms speak, how early, and which, then each run that they or its maker were wrong about."""
    logging.disable(logging.WARNING)
    # accelerate's logger needs a state.
    PartialState()
    records = [record for record in load(folder) if half in (None, record["half"])]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["half"], record["kind"]), []).append(record)
        if record["kind"] not in ("healthy", "broken"):
            groups.setdefault((record["half"], "all six" if record["half"] == "judging" else "all"), []).append(record)
    print(f"{'half':8} {'kind':8} {'as made':>9} {'alarms':>9} {'median':>6}  {'first alarm':40} all alarms")
    for (name, kind), runs in sorted(groups.items()):
        print(row(name, kind, runs))
    for record in records:
        heard, turned = replay(record), broke(record)
        if turned != (record["kind"] != "healthy") or bool(heard) != turned:
            print(describe(record, heard))


def describe(record: dict[str, Any], heard: list[tuple[str, float]]) -> str:
    """Return what there is to see in a run."""
    changes = ", ".join(f"{n} {v:.2f} -> {record['after'][n]:.2f}" for n, v in record["before"].items())
    said = ", ".join(f"{name} at {when:.0%}" for name, when in heard) or "no alarm"
    state = "broke" if broke(record) else "did not break"
    return f"{record['name']:22} {record['method']:4} {record['paid']:8} {state}: {changes}; {said} {record['stopped']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["run", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", help="train the runs whose names match, such as 'judging-blind-*'")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--half", choices=["setting", "judging", "dpo"], help="show this half alone")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="thresholds to try")
    args = parser.parse_args()
    for name, value in (setting.split("=") for setting in args.set):
        if not hasattr(alarms, name):
            parser.error(f"pipeline.rl.alarms has no {name}")
        setattr(alarms, name, type(getattr(alarms, name))(value))
    if args.do == "run":
        run(args.folder, args.only, args.processes)
    else:
        table(args.folder, args.half)


if __name__ == "__main__":
    main()
