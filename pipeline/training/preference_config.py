"""The arguments of preference tuning on fixed answers, with TRL's `DPOTrainer` and `KTOTrainer`."""

from dataclasses import dataclass

import trl

from pipeline.errors import Problem, refuse_values

OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses that only depend on the difference of a pair's scores, or not on scores at all."""

LOSSES = (*OF_DIFFERENCES, "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

NO_BETA = "must be above 0: it scales everything that is learned"


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's `DPOConfig`. Raises a `ValueError` for values with which TRL would fail after loading the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        losses = set(self.loss_type)
        smoothed = losses & {"robust", "exo_pair"}
        refused = {
            "loss_type": not losses <= set(LOSSES) and f"must be of {', '.join(LOSSES)}",
            "beta": self.beta == 0 and NO_BETA,
            "f_divergence_type": (self.f_divergence_type not in DIVERGENCES and f"must be of {', '.join(DIVERGENCES)}")
            or (
                self.f_divergence_type != "reverse_kl"
                and not losses <= set(OF_DIFFERENCES)
                and f"is only defined for the losses {', '.join(OF_DIFFERENCES)}; omit it, or choose one of them"
            ),
            "label_smoothing": ("exo_pair" in losses and self.label_smoothing == 0 and "exo_pair needs it, e.g. 1e-3")
            or (smoothed and not 0 <= self.label_smoothing < 0.5 and "must be at least 0 and below 0.5"),
            "ld_alpha": self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1 and "must be between 0 and 1",
            "discopop_tau": self.discopop_tau == 0 and "must be above 0",
            "use_weighting": self.use_weighting and losses & {"aot", "aot_unpaired"} and "aot sorts the pairs; omit it",
            "padding_free": self.padding_free and "TRL currently pads the pairs; omit it",
            "train_sampling_strategy": self.train_sampling_strategy == "group_by_length"
            and "a pair has two lengths; omit it",
        }
        refuse_values(*(Problem(name, getattr(self, name), str(remedy)) for name, remedy in refused.items() if remedy))


@dataclass
class KTOConfig(trl.KTOConfig):
    """TRL's `KTOConfig`. Raises a `ValueError` for values with which TRL would fail after loading the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refused = {
            "beta": self.beta == 0 and NO_BETA,
            "per_device_train_batch_size": self.loss_type == "kto"
            and self.per_device_train_batch_size < 2
            and "must be at least 2: the KL is estimated with the answer of another row",
            "train_sampling_strategy": self.train_sampling_strategy != "sequential"
            and "the rows are shuffled once, and neighbours stay together; omit it",
        }
        refuse_values(*(Problem(name, getattr(self, name), str(remedy)) for name, remedy in refused.items() if remedy))
