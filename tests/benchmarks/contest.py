"""
# Which of two versions of pocket is faster, with its promises kept

```bash
python -m tests.benchmarks.contest --record runs/record --contender runs/contender
python -m tests.benchmarks.contest --resample runs/*          # how often the rule errs, from recorded runs
```

Each folder holds `seed0`, `seed1` and so on, finished runs of one version on one machine; `recipes/pocket/program.md`
says how to run them in turns. The rule:

- The contest is judged at 10 seeds, and once more at 16 if it is still open. Seeds count from 0, so that nobody chooses
  them.
- The contender is faster if p < 0.001 at 10 seeds, or p < 0.009 at 16. A version that is not faster passes at either
  look with a probability of at most 0.01 (Bonferroni). Without a difference, either run of a pair could have been the
  other version's, so p is the share of the sign flips of the pairs that gain at least as much (Fisher's randomization
  test). It assumes nothing about the noise but that both versions meet the same.
- The gain of a step is the interquartile mean over the pairs of the seconds saved, as a share of a run's seconds, and
  that of a run is their sum: a burst of other work during one step counts little.
- The contender keeps its promises if it keeps each by the mean over the seeds, and breaks none more often than the
  record does (one-sided sign test over the pairs, p < 0.05: 5 seeds more, if none the other way). A figure that was not
  measured is a broken promise. The promises are those of this checkout, for both.

`--resample` says how often such contests are won on this machine. It takes the noise from the training logs of recorded
runs, whatever their versions: the halves of a training step are the same code on the same machine within some minutes,
as two versions are that take turns. The halves are closer in time, and shorter, than whole steps. Evaluations log no
times, and count as the training steps do.
"""

import argparse
import json
import math
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path

import numpy as np

from pipeline.errors import Problem, UserError
from pipeline.evaluation.intervals import student_t
from pipeline.report.differences import check_rows, differences, pair_by_seed
from pipeline.report.load import Run, load_runs
from pipeline.report.seeds import find_seeds
from pipeline.report.summary import seconds
from pipeline.report.targets import ROUNDING, Target, check_targets, load_targets

LOOKS = {10: 0.001, 16: 0.009}
"""Seeds at which a contest is judged -> the largest p of a faster contender. Together at most 0.01."""
BROKEN_MORE = 0.05
"""The p below which a promise counts as broken more often."""
FLIPS = 4096
"""Sign flips that are drawn where there are more."""
GOAL = 0.03
"""A gain that a contest should be able to see."""
TRAINED = ("1_pretrain", "2_sft", "3_reward", "3_ppo", "4_grpo")


@dataclass(frozen=True)
class Verdict:
    """What the seconds of a contest say.

    Attributes:
        gain: Share of the record's seconds that the contender saves.
        low: Lower end of its 95% interval over the seeds.
        high: Upper end.
        p: Probability of such a gain without a difference.
        visible: Smallest gain that this contest accepts in 80% of the cases.
        faster: True or False; None if the contest goes on at the next look.
    """

    gain: float
    low: float
    high: float
    p: float
    visible: float
    faster: bool | None

    def __str__(self) -> str:
        if self.faster is None:
            found = f"open; go on to {max(LOOKS)} seeds"
        elif self.faster:
            found = "faster"
        else:
            found = f"not faster, or by less than the {self.visible:.1%} that this machine's noise lets a contest see"
        return f"{self.gain:.1%} of the seconds saved ({self.low:.1%} to {self.high:.1%}), p = {self.p:.4f}: {found}"


def judge(record: np.ndarray, contender: np.ndarray) -> Verdict:
    """Judge by the seconds.

    Args:
        record: Seconds of the record, one row for each seed and one column for each step, at least as many rows as the
            first look has; rows beyond a look are not looked at.
        contender: Seconds of the contender, likewise.
    """
    seeds = max(look for look in LOOKS if look <= len(record))
    saved = (record[:seeds] - contender[:seeds]) / (record[:seeds] + contender[:seeds]).sum(1, keepdims=True) * 2
    random = np.random.default_rng(0)
    if 2**seeds <= FLIPS:
        flips = np.array(list(product((1.0, -1.0), repeat=seeds)))
    else:
        flips = np.vstack([np.ones(seeds), random.choice((1.0, -1.0), (FLIPS - 1, seeds))])
    gains = _gain(flips[:, :, None] * saved)
    p = float(np.mean(gains >= gains[0] - 1e-12))
    resampled = _gain(saved[random.integers(seeds, size=(1000, seeds))])
    # Shares of the mean of both become shares of the record's seconds.
    gain, low, high = (float(value / (1 + value / 2)) for value in (gains[0], *np.quantile(resampled, (0.025, 0.975))))
    # The normal quantiles of 0.991 and 0.8.
    visible = (2.37 + 0.84) * float(_gain(flips[:, :, None] * (saved - np.median(saved, 0))).std())
    open_still = p >= LOOKS[seeds] and seeds < max(LOOKS)
    return Verdict(gain, low, high, p, visible, None if open_still else p < LOOKS[seeds])


def _gain(saved: np.ndarray) -> np.ndarray:
    """Return the sum over the steps (last axis) of the interquartile means over the seeds (the axis before)."""
    drop = saved.shape[-2] // 4
    return np.sort(saved, axis=-2)[..., drop : saved.shape[-2] - drop, :].mean(-2).sum(-1)


def broken_promises(record: np.ndarray, contender: np.ndarray) -> np.ndarray:
    """Return whether the contender breaks each promise by its mean, or more often than the record.

    Args:
        record: By how much the record keeps each promise, one row for each seed; negative where it breaks it.
        contender: The same of the contender.
    """
    ours, theirs = contender < -ROUNDING, record < -ROUNDING
    worse, unequal = (ours & ~theirs).sum(0), (ours ^ theirs).sum(0)
    tails = [sum(math.comb(m, i) for i in range(k, m + 1)) / 2**m for k, m in zip(worse, unequal, strict=True)]
    return (contender.mean(0) < -ROUNDING) | (np.array(tails) < BROKEN_MORE)


def margins(run: Run, targets: list[Target]) -> list[float]:
    """Return by how much a run keeps each promise; minus infinity for one whose figure it did not measure."""
    found = {result["promise"]: result["measured"] for result in check_targets(run, differences(run), targets)}
    shown = []
    for target in targets:
        value = found.get(str(target), math.nan)
        least = value - target.at_least if target.at_least is not None else math.inf
        most = target.at_most - value if target.at_most is not None else math.inf
        shown.append(min(least, most) if str(target) in found else -math.inf)
    return shown


def hold(record: Path, contender: Path) -> bool:
    """Judge the runs in two folders, print the verdict, and return whether the contender has won.

    Raises:
        UserError: If the runs cannot be compared.
    """
    pairs, problems = pair_by_seed(load_runs(find_seeds(record)), load_runs(find_seeds(contender)))
    problems += check_rows(pairs)
    pairs = sorted(pairs, key=lambda pair: int(pair[0].record.get("seed", 0)))
    if [pair[0].record.get("seed") for pair in pairs] != list(range(len(pairs))) or len(pairs) < min(LOOKS):
        problems.append(Problem("--record", record, f"needs the seeds from 0 on, at least {min(LOOKS)} of them"))
    machines = {json.dumps(run.hardware, sort_keys=True): run for pair in pairs for run in pair}
    if len(machines) > 1:
        remedy = "ran on another machine; run both versions in turns on one"
        problems.append(Problem("--contender", list(machines.values())[1].path, remedy))
    if problems:
        raise UserError(*problems)
    pairs = pairs[: max(look for look in LOOKS if look <= len(pairs))]
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    taken = [[seconds(run) for run in side] for side in sides]
    steps = sorted({step for side in taken for of_run in side for step in of_run})
    verdict = judge(*(np.array([[of_run.get(step, 0.0) for step in steps] for of_run in side]) for side in taken))

    targets = load_targets()
    kept = [np.array([margins(run, targets) for run in side]) for side in sides]
    broken = broken_promises(*kept)
    n = len(pairs)
    print(f"{'promise, and by how much the contender keeps it':100} {'mean':>8}  {'95% interval':18} broken")
    for index, target in enumerate(targets):
        mean, half = kept[1][:, index].mean(), student_t(n - 1) * kept[1][:, index].std(ddof=1) / n**0.5
        often = [int((side[:, index] < -ROUNDING).sum()) for side in kept]
        mark = "  <- broken" if broken[index] else ""
        figures = f"{mean:8.3f}  {mean - half:8.3f} {mean + half:8.3f}"
        print(f"{target!s:100} {figures}  {often[1]} (record {often[0]}){mark}")
    for name, side in zip(("record", "contender"), taken, strict=True):
        whole = [sum(of_run.values()) for of_run in side]
        print(f"{name}: {np.mean(whole):.0f} s (standard deviation {np.std(whole, ddof=1):.0f}, {n} seeds)")
    print(verdict)
    won = bool(verdict.faster) and not broken.any()
    print("THE CONTENDER WINS" if won else f"the record stands{', for now' if verdict.faster is None else ''}")
    return won


def noise(run: Path) -> list[float]:
    """Return log(seconds of an update in the second half / in the first half) of each training step of a run."""
    found = []
    for step in TRAINED:
        history = json.loads((run / step / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        logged = [item for item in history if "train_runtime" in item and "loss" in item]
        points = [(item["step"], item["train_runtime"]) for item in logged]
        if len(points) < 4:
            # Trainers of TRL log the seconds of an update instead.
            logged = [item for item in history if "step_time" in item]
            times = accumulate(item["step_time"] for item in logged)
            points = [(item["step"], time) for item, time in zip(logged, times, strict=True)]
        half = len(points) // 2
        (a, start), (b, middle), (c, end) = points[0], points[half], points[-1]
        found.append(math.log((end - middle) / (c - b) / ((middle - start) / (b - a))))
    return found


def simulate(
    halves: np.ndarray, share: np.ndarray, kept: np.ndarray, gain: float, contests: int, scale: float = 1.0
) -> tuple[float, float]:
    """Return the shares of simulated contests that are won, and that are won at the first look.

    Args:
        halves: `noise` of each recorded run.
        share: Share of a run's seconds that each step takes.
        kept: `margins` of each recorded run.
        gain: Share of the seconds that the contender saves.
        contests: How many to hold.
        scale: What the noise is multiplied by.
    """
    random = np.random.default_rng(1)
    # A half that is slower in all runs is not noise: completions, for instance, grow longer as a stage goes on.
    halves = scale * (halves - np.median(halves, 0))
    seeds, won, early = max(LOOKS), 0, 0
    for _ in range(contests):
        # Which half is the record's is drawn as well. The rows of a run stay together, since load outlasts a step.
        drawn = halves[random.integers(len(halves), size=seeds)] * random.choice((1.0, -1.0), (seeds, 1)) / 2
        sides = share * np.exp(drawn), share * np.exp(-drawn) * (1 - gain)
        theirs, ours = (kept[random.integers(len(kept), size=seeds)] for _ in sides)
        for look in LOOKS:
            verdict = judge(*(side[:look] for side in sides))
            if verdict.faster is not None:
                break
        win = bool(verdict.faster) and not broken_promises(theirs[:look], ours[:look]).any()
        won += win
        early += win and look == min(LOOKS)
    return won / contests, early / contests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="folder with the runs of the record")
    parser.add_argument("--contender", type=Path, help="folder with the runs of the contender")
    parser.add_argument("--resample", type=Path, nargs="+", help="recorded runs, of any version")
    parser.add_argument("--contests", type=int, default=2000, help="simulated contests")
    args = parser.parse_args()
    try:
        if args.resample:
            targets = load_targets()
            runs = load_runs(args.resample)
            taken = np.array([[seconds(run)[step] for step in TRAINED] for run in runs])
            share = np.median(taken / taken.sum(1, keepdims=True), 0)
            halves = np.array([noise(run.path) for run in runs])
            kept = np.array([margins(run, targets) for run in runs])
            print(f"{len(runs)} recorded runs, {args.contests} contests: won, and won at {min(LOOKS)} seeds")
            for scale, gain in product((1.0, 1 / 2, 1 / 4), (0.0, GOAL)):
                won, early = simulate(halves, share / share.sum(), kept, gain, args.contests, scale)
                print(f"noise x {scale:<5} gain {gain:.0%}   {won:6.1%}  {early:6.1%}", flush=True)
        else:
            hold(args.record, args.contender)
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
