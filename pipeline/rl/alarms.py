"""Alarms that report the collapse of a policy during training, from metrics that GRPO and PPO log anyway.

`tests/benchmarks/alarms.py` tests them on runs that are known to have broken or not, and has the results.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerState
from trl import GRPOConfig

logger = get_logger(__name__)

# Share of the entropy at the start, below which samples of one prompt are nearly all the same. The runs of
# `recipes/pocket` end at two thirds of it (PPO) and at an eighth (GRPO, which by then solves most problems).
ENTROPY_SHARE = 0.03
# The same in nats per token, for runs that start with little entropy.
MIN_ENTROPY = 0.005
# Share of completions that run into the limit. Above it, most rewards are for unfinished text.
MAX_CUT_OFF = 0.5
# Share of the initial length, below which completions are too short.
LENGTH_SHARE = 0.1
# The same in tokens. An empty completion has one token, its end of turn.
MIN_LENGTH = 1.5
# Standard deviation of the rewards as a share of its maximum so far. Below it, nearly all rewards are equal.
SPREAD_SHARE = 0.01
# Share of groups in which rewards differ. Other groups have no advantages: below it, 19 of 20 samples are wasted.
MIN_INFORMATIVE = 0.05
# Nats per token from the reference. RLHF mostly ends at 0.05 to 0.5; above 1, hardly any of its language is left.
MAX_KL = 1.0
# Share of the way from the lowest mean reward to the highest single one. If rewards check right and wrong, a mean above
# it is success, and equal rewards and low entropy are fine. Scores of a reward model have no ceiling.
MASTERY = 0.9
# Minimum number of consecutive bad log entries for an alarm.
MIN_ENTRIES = 3
# Minimum number of completions in these entries: small batches are often all right or all wrong.
MIN_COMPLETIONS = 64

EXPLORE = "lower learning_rate, or raise entropy_coef or the KL penalty (kl_coef in PPO, beta in GRPO)"
# The unit of an alarm's metric, and what to try, by the alarm's name.
ADVICE = {
    "entropy": f"nats per token; the policy hardly explores any more: {EXPLORE}",
    "length_at_limit": "of completions are cut off; raise max_completion_length, or set mask_truncated_completions",
    "length_near_zero": f"tokens per completion; see what the reward pays for empty answers, {EXPLORE}",
    "reward_spread": "standard deviation of the rewards; check the reward and the difficulty of the problems",
    "uninformative_groups": "of groups have equal rewards; choose other problems, or raise num_generations",
    "kl": f"nats per token from the reference; {EXPLORE}",
}


@dataclass(eq=False)
class CollapseAlarms(TrainerCallback):
    """Warn once of each kind of collapse, and add `{"alarm/<name>": value, "step": N}` to the log.

    If most entries are bad, but too few in a row, the alarm is raised at the end. Everything is derived from the log,
    so that a resumed run raises the same alarms as an uninterrupted one.

    Args:
        checked: Whether rewards are checks with a best value, and not scores of a reward model.
    """

    checked: bool

    def __post_init__(self) -> None:
        # How many entries in a row have to be bad for an alarm.
        self._patience = MIN_ENTRIES
        # The first entropy and length that were logged.
        self._start: dict[str, float] = {}
        # The mean reward of the latest entry, the lowest one so far, and the highest reward of a single completion.
        self._reward = math.nan
        self._lowest = math.inf
        self._highest = -math.inf
        # The highest standard deviation of the rewards so far.
        self._deviation = 0.0
        # The values of each alarm so far, None where they are not bad.
        self._values: dict[str, list[float | None]] = {}
        self._raised: set[str] = set()

    def on_train_begin(self, args: GRPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Read what was logged before a resumed run stopped."""
        self._read_history(args, state)

    def _read_history(self, args: GRPOConfig, state: TrainerState) -> None:
        # Forget what another run has logged.
        self.__post_init__()
        self._patience = max(MIN_ENTRIES, math.ceil(MIN_COMPLETIONS / args.generation_batch_size))
        for entry in state.log_history:
            self._read(entry)

    def on_log(self, args: GRPOConfig, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Raise the alarms of the latest entry."""
        for name, value in self._read(logs or {}).items():
            self._raise(name, value, state)

    def on_train_end(self, args: GRPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Raise each alarm that was not raised although most entries are bad, as in a short run with few entries."""
        if state.global_step < state.max_steps:
            return
        # A run that was killed after its last step does not begin again.
        if not self._values:
            self._read_history(args, state)
        for name, values in self._values.items():
            bad = [value for value in values if value is not None]
            if name not in self._raised and 2 * len(bad) > len(values):
                self._raise(name, bad[-1], state)

    def _raise(self, name: str, value: float, state: TrainerState) -> None:
        state.log_history.append({f"alarm/{name}": value, "step": state.global_step})
        logger.warning("%-11s %s at step %d: %.3g %s", "alarm", name, state.global_step, value, ADVICE[name])

    def _read(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """Process a log entry, and return the values of the alarms that it raises, by name."""
        entry = {name: value for name, value in logs.items() if value is not None}
        raised = {}
        for name, (value, is_bad) in self._judge(entry).items():
            values = self._values.setdefault(name, [])
            values.append(value if is_bad else None)
            latest = values[-self._patience :]
            if name not in self._raised and len(latest) == self._patience and None not in latest:
                self._raised.add(name)
                raised[name] = value
        return raised

    def _judge(self, entry: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
        """Return the value for each alarm that a log entry has, and whether it is bad."""
        self._reward = entry.get("reward", self._reward)
        self._lowest = min(self._lowest, entry.get("reward", math.inf))
        self._highest = max(self._highest, entry.get("reward_max", -math.inf))
        # A mean reward that is nearly as high as the highest single one is success, not collapse.
        reward_range = self._highest - self._lowest
        is_near_best = self._reward >= self._lowest + MASTERY * reward_range
        has_mastered = self.checked and reward_range > 0 and is_near_best
        values: dict[str, tuple[float, bool]] = {}
        length = entry.get("completions/mean_length")
        if length is not None:
            first_length = self._start.setdefault("length", length)
            limit = max(LENGTH_SHARE * first_length, MIN_LENGTH)
            values["length_near_zero"] = (length, length <= limit)
            cut_off = entry["completions/clipped_ratio"]
            values["length_at_limit"] = (cut_off, cut_off >= MAX_CUT_OFF)
        entropy = entry.get("entropy")
        if entropy is not None:
            first_entropy = self._start.setdefault("entropy", entropy)
            limit = max(ENTROPY_SHARE * first_entropy, MIN_ENTROPY)
            values["entropy"] = (entropy, entropy <= limit and not has_mastered)
        deviation = entry.get("reward_std")
        if deviation is not None:
            self._deviation = max(self._deviation, deviation)
            is_flat = deviation <= SPREAD_SHARE * self._deviation
            values["reward_spread"] = (deviation, is_flat and not has_mastered)
        uninformative = entry.get("frac_reward_zero_std")
        if uninformative is not None:
            informative = 1 - uninformative
            values["uninformative_groups"] = (uninformative, informative <= MIN_INFORMATIVE and not has_mastered)
        # PPO logs the KL of a completion, GRPO that of a token.
        kl = entry.get("kl")
        if length and "objective/kl" in entry:
            kl = entry["objective/kl"] / length
        if kl is not None:
            values["kl"] = (kl, kl >= MAX_KL)
        return values
