"""
# Which of two versions of pocket is faster, with its promises kept

```bash
python -m tests.benchmarks.contest --record runs/record --contender runs/contender
python -m tests.benchmarks.contest --record runs/a --contender runs/b --resample runs/*   # how often the rule errs
```

Each folder holds `seed0`, `seed1` and so on, finished runs of one version, made by `tests.benchmarks.turns` on one
machine. The rule:

- The contest is judged at 10 seeds, and once more at 16 if it is still open. Seeds count from 0, so that nobody chooses
  them.
- The contender is faster if p < 0.001 at 10 seeds, or p < 0.009 at 16. A version that is not faster passes at either
  look with a probability of at most 0.01 (Bonferroni). p is that of Wilcoxon's signed-rank test over the pairs
  (one-sided, exact): without a difference, either run of a pair could have been the other version's.
- The gain is the median over the pairs of the seconds saved, as a share of the record's: what went wrong in one pair
  counts little, here and in the ranks. Still, two such pairs of 16 hide a gain (p = 0.029), and one of 10 does at the
  first look (p = 0.042). What slows the machine meets both sides.
- The contender keeps its promises if it keeps each by the mean over the seeds, and breaks none more often than the
  record does (one-sided sign test over the pairs, p < 0.05: 5 seeds more, if none the other way). A figure that was not
  measured is a broken promise. The promises are those of this checkout, for both.

`--resample` says how often such contests are won on this machine. The noise is that of the pairs in `--record` and
`--contender`, at least 10 of them, whether of one version or two: what all pairs have in common is not noise. How
promises are kept is drawn from the runs that follow it, of any version.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import Problem, UserError
from pipeline.evaluation.intervals import student_t
from pipeline.report.differences import check_rows, differences, pair_by_seed
from pipeline.report.load import Run, load_runs
from pipeline.report.seeds import find_seeds
from pipeline.report.targets import ROUNDING, Target, check_targets, load_targets
from tests.benchmarks import turns

LOOKS = {10: 0.001, 16: 0.009}
"""Seeds at which a contest is judged -> the largest p of a faster contender. Together at most 0.01."""
BROKEN_MORE = 0.05
"""The p below which a promise counts as broken more often."""
GOAL = 0.03
"""A gain that a contest should be able to see."""


@dataclass(frozen=True)
class Verdict:
    """What the seconds of a contest say.

    Attributes:
        gain: Share of the record's seconds that the contender saves.
        low: Lower end of its 95% interval over the seeds.
        high: Upper end.
        p: Probability of such a gain without a difference.
        faster: True or False; None if the contest goes on at the next look.
    """

    gain: float
    low: float
    high: float
    p: float
    faster: bool | None

    def __str__(self) -> str:
        outcome = {None: f"open; go on to {max(LOOKS)} seeds", True: "faster", False: "not faster"}[self.faster]
        return f"{self.gain:.1%} of the seconds saved ({self.low:.1%} to {self.high:.1%}), p = {self.p:.4f}: {outcome}"


def judge(record: np.ndarray, contender: np.ndarray) -> Verdict:
    """Judge by the seconds.

    Args:
        record: Seconds of the record, one for each seed, at least as many as the first look has; those beyond a look
            are not looked at.
        contender: Seconds of the contender, likewise.
    """
    seeds = max(look for look in LOOKS if look <= len(record))
    saved = 1 - contender[:seeds] / record[:seeds]
    p = signed_rank(np.log(record[:seeds] / contender[:seeds]))
    resampled = np.median(saved[np.random.default_rng(0).integers(seeds, size=(1000, seeds))], -1)
    low, high = (float(end) for end in np.quantile(resampled, (0.025, 0.975)))
    open_still = p >= LOOKS[seeds] and seeds < max(LOOKS)
    return Verdict(float(np.median(saved)), low, high, p, None if open_still else p < LOOKS[seeds])


def signed_rank(differences: np.ndarray) -> float:
    """Return the probability of so large a sum of the positive differences' ranks, if each sign were a coin's.

    Wilcoxon, 1945, "Individual comparisons by ranking methods". Ranks are by absolute value, from 1; without ties.
    """
    ranks = np.abs(differences).argsort().argsort() + 1
    # ways[s]: how many of the sets of ranks have the sum s.
    ways = np.ones(1)
    for rank in range(1, len(ranks) + 1):
        ways = np.convolve(ways, [1, *[0] * (rank - 1), 1])
    return float(ways[ranks[differences > 0].sum() :].sum() / ways.sum())


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
    measured = {result["promise"]: result["measured"] for result in check_targets(run, differences(run), targets)}
    values = []
    for target in targets:
        value = measured.get(str(target), math.nan)
        least = value - target.at_least if target.at_least is not None else math.inf
        most = target.at_most - value if target.at_most is not None else math.inf
        values.append(min(least, most) if str(target) in measured else -math.inf)
    return values


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
    for run in (run for pair in pairs for run in pair if not (run.path / turns.NAME).exists()):
        problems.append(Problem("turns.json", run.path, "is missing; run both with tests.benchmarks.turns"))
    machines = {json.dumps(run.hardware, sort_keys=True): run for pair in pairs for run in pair}
    if len(machines) > 1:
        remedy = "ran on another machine; run both versions in turns on one"
        problems.append(Problem("--contender", list(machines.values())[1].path, remedy))
    if problems:
        raise UserError(*problems)
    pairs = pairs[: max(look for look in LOOKS if look <= len(pairs))]
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    taken = [np.array([turns.seconds(run.path) for run in side]) for side in sides]
    verdict = judge(*taken)

    targets = load_targets()
    side_margins = [np.array([margins(run, targets) for run in side]) for side in sides]
    broken = broken_promises(*side_margins)
    n = len(pairs)
    print(f"{'promise, and by how much the contender keeps it':100} {'mean':>8}  {'95% interval':18} broken")
    for index, target in enumerate(targets):
        mean, half = side_margins[1][:, index].mean(), student_t(n - 1) * side_margins[1][:, index].std(ddof=1) / n**0.5
        often = [int((side[:, index] < -ROUNDING).sum()) for side in side_margins]
        mark = "  <- broken" if broken[index] else ""
        figures = f"{mean:8.3f}  {mean - half:8.3f} {mean + half:8.3f}"
        print(f"{target!s:100} {figures}  {often[1]} (record {often[0]}){mark}")
    for name, side in zip(("record", "contender"), taken, strict=True):
        print(f"{name}: {side.mean():.0f} s (standard deviation {side.std(ddof=1):.0f}, {n} seeds)")
    print(verdict)
    won = bool(verdict.faster) and not broken.any()
    print("THE CONTENDER WINS" if won else f"the record stands{', for now' if verdict.faster is None else ''}")
    return won


def simulate(noise: np.ndarray, run_margins: np.ndarray, gain: float, contests: int) -> tuple[float, float]:
    """Return the shares of simulated contests that are won, and that are won at the first look.

    Args:
        noise: log(seconds of one version / seconds of the other) of each recorded pair.
        run_margins: `margins` of each recorded run.
        gain: Share of the seconds that the contender saves.
        contests: How many to hold.
    """
    random = np.random.default_rng(1)
    noise = noise - np.median(noise)
    seeds, won, early = max(LOOKS), 0, 0
    for _ in range(contests):
        # Which side of a pair is the record's is drawn as well.
        drawn = random.choice(noise, seeds) * random.choice((1.0, -1.0), seeds) / 2
        sides = np.exp(drawn), np.exp(-drawn) * (1 - gain)
        theirs, ours = (run_margins[random.integers(len(run_margins), size=seeds)] for _ in sides)
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
    parser.add_argument("--record", type=Path, required=True, help="folder with the runs of the record")
    parser.add_argument("--contender", type=Path, required=True, help="folder with the runs of the contender")
    parser.add_argument("--resample", type=Path, nargs="+", help="simulate contests; runs that have measured promises")
    parser.add_argument("--contests", type=int, default=2000, help="simulated contests")
    args = parser.parse_args()
    try:
        if args.resample:
            targets = load_targets()
            run_margins = np.array([margins(run, targets) for run in load_runs(args.resample)])
            sides = (args.record, args.contender)
            names = set.intersection(*({path.parent.name for path in side.glob(f"*/{turns.NAME}")} for side in sides))
            if len(names) < min(LOOKS):
                few = f"has {len(names)} pairs that ran in turns; at least {min(LOOKS)} are needed"
                raise UserError(Problem("--contender", args.contender, few))
            taken = [np.array([turns.seconds(side / name) for name in sorted(names)]) for side in sides]
            noise = np.log(taken[0] / taken[1])
            pairs = f"{len(noise)} pairs, log ratios of their seconds {noise.round(3)}"
            print(f"{pairs}; promises of {len(run_margins)} runs")
            for gain in (0.0, GOAL / 2, GOAL):
                won, early = simulate(noise, run_margins, gain, args.contests)
                print(f"gain {gain:<5.1%}  won {won:6.1%}, at {min(LOOKS)} seeds {early:6.1%}", flush=True)
        else:
            hold(args.record, args.contender)
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
