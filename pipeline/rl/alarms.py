"""Alarms that name the collapse of a policy while it trains, from the figures that GRPO and PPO log anyway."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import GRPOConfig

logger = get_logger(__name__)

ENTROPY_SHARE, MIN_ENTROPY = 0.03, 0.005
"""Share of the entropy at the start, and nats per token, below which samples of one prompt are nearly all the same. The
runs of `recipes/pocket` end at two thirds of it (PPO) and at an eighth (GRPO, which solves most problems by then)."""

MAX_CUT_OFF = 0.5
"""Share of completions that run into the limit: above it, most rewards are for text without its end."""

LENGTH_SHARE, MIN_LENGTH = 0.1, 1.5
"""Share of the length at the start, and tokens: an empty completion is one token long, its end of turn."""

SPREAD_SHARE = 0.01
"""Standard deviation of the rewards as a share of its largest value so far. Below it, nearly all are equal."""

MIN_INFORMATIVE = 0.05
"""Share of groups in which rewards differ. The others have no advantage: below it, 19 of 20 samples are wasted."""

MAX_KL = 1.0
"""Nats per token to the reference. RLHF mostly ends at 0.05 to 0.5; above 1, hardly any of its language is left."""

MASTERY = 0.9
"""Share of the way from the lowest mean reward to the highest single one. Where right and wrong are checked, a mean
beyond it is success: equal rewards and low entropy are what was asked for. Scores of a reward model have no ceiling."""

MIN_ENTRIES, MIN_COMPLETIONS = 3, 64
"""Entries of the log in a row that have to be bad, and completions that they have to describe, to raise an alarm: small
batches are often all right or all wrong. As many have to be good before it may be raised again."""

RECOVERY = 0.5
"""Good is a figure half as bad as one that raises an alarm."""

EXPLORE = "lower learning_rate, or raise entropy_coef or the KL penalty (kl_coef in PPO, beta in GRPO)"
ADVICE = {
    "entropy": f"nats per token; the policy hardly explores any more: {EXPLORE}",
    "length_at_limit": "of completions are cut off; raise max_completion_length, or set mask_truncated_completions",
    "length_near_zero": f"tokens per completion; see what the reward pays for empty answers, {EXPLORE}",
    "reward_spread": "standard deviation of the rewards; check the reward and the difficulty of the problems",
    "uninformative_groups": "of groups have equal rewards; choose other problems, or raise num_generations",
    "kl": f"nats per token from the reference; {EXPLORE}",
}
"""What an alarm's figure is, and what to try, by the alarm's name."""


class CollapseAlarms(TrainerCallback):
    """Warn once of each kind of collapse, until it recovers, and add `{"alarm/<name>": figure, "step": N}` to the log.

    Where most entries are bad, but too few in a row, the alarm is raised at the end.

    All is derived from the log, which checkpoints contain, so that a resumed run raises the alarms of an uninterrupted
    one.

    Args:
        checked: Whether rewards are checks, with a best value, and not scores of a reward model.
    """

    def __init__(self, checked: bool) -> None:
        self.checked = checked
        self._patience = MIN_ENTRIES
        self._forget()

    def _forget(self) -> None:
        self._start: dict[str, float] = {}
        self._reward, self._lowest, self._highest, self._deviation = math.nan, math.inf, -math.inf, 0.0
        # The alarms that are raised now, and the ones that ever were.
        self._raised: set[str] = set()
        self._ever: set[str] = set()
        # How many entries in a row speak for changing the state of an alarm, by its name.
        self._against: Counter[str] = Counter()
        # How many entries had a figure for it, how many of them were bad, and the last such figure.
        self._seen: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read what was logged before a resumed run stopped."""
        self._forget()
        self._patience = max(MIN_ENTRIES, math.ceil(MIN_COMPLETIONS / args.generation_batch_size))
        for entry in state.log_history:
            self._read(entry)

    def on_log(
        self, args: GRPOConfig, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Raise the alarms of the latest entry."""
        self._raise(self._read(logs or {}), state)

    def on_train_end(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise each alarm that was not raised although most entries are bad: a short run has few."""
        if state.global_step >= state.max_steps:
            bad = {name: self._latest[name] for name, count in self._bad.items() if 2 * count > self._seen[name]}
            self._raise({name: value for name, value in bad.items() if name not in self._ever}, state)

    def _raise(self, alarms: Mapping[str, float], state: TrainerState) -> None:
        for name, value in alarms.items():
            state.log_history.append({f"alarm/{name}": value, "step": state.global_step})
            logger.warning("%-11s %s at step %d: %.3g %s", "alarm", name, state.global_step, value, ADVICE[name])

    def _read(self, entry: Mapping[str, Any]) -> dict[str, float]:
        """Take in an entry of the log, and return the figures of the alarms that it raises."""
        raised = {}
        for name, value, severity in self._severities({k: v for k, v in entry.items() if v is not None}):
            # Bad entries speak against an alarm that is not raised, good ones against one that is.
            self._seen[name] += 1
            if severity >= 1:
                self._bad[name] += 1
                self._latest[name] = value
            against = severity < RECOVERY if name in self._raised else severity >= 1
            self._against[name] = self._against[name] + 1 if against else 0
            if self._against[name] == self._patience:
                self._against[name] = 0
                self._raised ^= {name}
                if name in self._raised:
                    raised[name] = value
                    self._ever.add(name)
        return raised

    def _severities(self, entry: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
        """Yield the name and the figure of each alarm, if the entry has it, and how bad it is: at its limit, 1."""
        self._reward = entry.get("reward", self._reward)
        self._lowest = min(self._lowest, entry.get("reward", math.inf))
        self._highest = max(self._highest, entry.get("reward_max", -math.inf))
        # A mean reward that is nearly as high as any single one was is success, not collapse.
        way = self._highest - self._lowest
        mastered = self.checked and way > 0 and self._reward >= self._lowest + MASTERY * way
        if (length := entry.get("completions/mean_length")) is not None:
            limit = max(LENGTH_SHARE * self._start.setdefault("length", length), MIN_LENGTH)
            yield "length_near_zero", length, _ratio(limit, length)
            cut_off = entry["completions/clipped_ratio"]
            yield "length_at_limit", cut_off, cut_off / MAX_CUT_OFF
        if (entropy := entry.get("entropy")) is not None:
            limit = max(ENTROPY_SHARE * self._start.setdefault("entropy", entropy), MIN_ENTROPY)
            yield "entropy", entropy, 0.0 if mastered else _ratio(limit, entropy)
        if (deviation := entry.get("reward_std")) is not None:
            self._deviation = max(self._deviation, deviation)
            yield "reward_spread", deviation, 0.0 if mastered else _ratio(SPREAD_SHARE * self._deviation, deviation)
        if (useless := entry.get("frac_reward_zero_std")) is not None:
            yield "uninformative_groups", useless, 0.0 if mastered else _ratio(MIN_INFORMATIVE, 1 - useless)
        kl = entry["objective/kl"] / length if length and "objective/kl" in entry else entry.get("kl")
        if kl is not None:
            yield "kl", kl, kl / MAX_KL


def _ratio(limit: float, figure: float) -> float:
    return limit / figure if figure > 0 else math.inf
