"""The arguments of preference tuning on fixed answers, with TRL's `DPOTrainer` and `KTOTrainer`.

TRL itself rejects what it does not know, such as a loss, once the model is loaded. What is rejected here are values
with which TRL would train, but on something else than was meant, or fail without saying why.
"""

from dataclasses import dataclass

import trl

from pipeline.errors import Problem, refuse_values

NO_BETA = "must be above 0: it scales everything that is learned"


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's `DPOConfig`. Raises a `ValueError` for values that TRL accepts and cannot train with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.beta == 0:
            problems.append(Problem("beta", self.beta, NO_BETA))
        # At 0.5, both orders of a pair are equally likely. TRL only warns.
        is_smoothed = "robust" in self.loss_type or "exo_pair" in self.loss_type
        if is_smoothed and not 0 <= self.label_smoothing < 0.5:
            problems.append(Problem("label_smoothing", self.label_smoothing, "must be at least 0 and below 0.5"))
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            problems.append(Problem("ld_alpha", self.ld_alpha, "must be between 0 and 1"))
        if self.discopop_tau == 0:
            problems.append(Problem("discopop_tau", self.discopop_tau, "must be above 0"))
        if self.padding_free:
            problems.append(Problem("padding_free", True, "TRL currently pads the pairs; omit it"))
        refuse_values(*problems)


@dataclass
class KTOConfig(trl.KTOConfig):
    """TRL's `KTOConfig`. Raises a `ValueError` for a `beta` of 0, with which nothing would be learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == 0:
            refuse_values(Problem("beta", self.beta, NO_BETA))
