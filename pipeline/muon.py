"""Muon for the weight matrices, AdamW for the rest, as one optimizer for any `Trainer`.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of each matrix. torch's
implementation takes matrices only, so embeddings and norms go to AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from pipeline.errors import Problem, UserError


@dataclass
class MuonArguments:
    """Which optimizer steps the weight matrices.

    Args:
        use_muon (`bool`, defaults to `False`): Muon for the matrices inside the transformer blocks, and AdamW with
            `learning_rate` for embeddings, output layer, norms and biases. `optim` says what is used otherwise.
        muon_learning_rate (`float`, defaults to 0.02): Muon's learning rate, on the schedule of `learning_rate`. It is
            the spectral norm of an update (of a matrix with no more rows than columns).
    """

    use_muon: bool = field(
        default=False, metadata={"help": "Muon for the matrices of the blocks, AdamW for everything else."}
    )
    muon_learning_rate: float = field(
        default=0.02,
        metadata={"help": "Learning rate of the matrices; learning_rate is that of everything else."},
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's `Muon` and `AdamW` behind one `step`, one list of parameter groups and one state.

    Args:
        matrices (`list[torch.nn.Parameter]`): two-dimensional parameters, stepped by Muon.
        others (`list[torch.nn.Parameter]`): stepped by AdamW, without weight decay.
        muon_lr (`float`): learning rate of the matrices.
        lr (`float`): learning rate of the others.
        weight_decay (`float`): decoupled weight decay of the matrices.
        betas (`tuple[float, float]`), eps (`float`): AdamW's.
    """

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[torch.nn.Parameter],
        muon_lr: float,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self._muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay)
        self._adamw = torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=betas, eps=eps)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a checkpoint replaces groups and state, so the parts are pointed at them anew.
        for part, group in zip((self._muon, self._adamw), self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss


def build(
    model: torch.nn.Module,
    muon_lr: float,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> MuonWithAdamW:
    """The optimizer for `model`: matrices of its blocks to Muon; embeddings, output layer and vectors to AdamW.

    Raises:
        UserError: If there is nothing for one of the two to train (with LoRA, say, where nothing but matrices is).
    """
    tables = {
        id(parameter)
        for name in ("get_input_embeddings", "get_output_embeddings")
        if (module := getattr(model, name, lambda: None)()) is not None
        for parameter in module.parameters()
    }
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in trained if id(p) not in chosen]
    if not matrices or not others:
        raise UserError(
            Problem("use_muon", True, "needs both matrices and other parameters to train; set it to false")
        )
    return MuonWithAdamW(matrices, others, muon_lr, lr, weight_decay, betas, eps)


def optimizer_cls_and_kwargs(
    args: TrainingArguments, muon: MuonArguments
) -> tuple[Any, dict[str, Any]] | None:
    """What a `Trainer` takes under this name: a factory of the optimizer, or `None` for the one `args.optim` names."""
    if not muon.use_muon:
        return None
    settings = {
        "muon_lr": muon.muon_learning_rate,
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return (lambda: build), settings
