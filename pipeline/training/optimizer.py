"""Optimizers that treat matrices, embeddings and the rest differently, for any `Trainer`.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of each matrix. torch's
implementation takes matrices only, so embeddings and norms go to AdamW.

Embeddings want a learning rate of their own: AdamW moves each number by about the learning rate, whatever its size, and
a row that tuning never shows (the name of a thing that no instruction mentions) is then moved as far as all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from pipeline.errors import Problem, UserError


@dataclass
class OptimizerArguments:
    """Which optimizer steps what. As they stand, the trainer's own optimizer (`optim`) steps everything alike.

    Args:
        use_muon (`bool`, defaults to `False`): Muon for the matrices inside the transformer blocks, and AdamW with
            `learning_rate` for embeddings, output layer, norms and biases.
        muon_learning_rate (`float`, defaults to 0.02): Muon's learning rate, on the schedule of `learning_rate`. It is
            the spectral norm of an update (of a matrix with no more rows than columns).
        embedding_learning_rate (`float`, *optional*): learning rate of the embeddings and the output layer, on the
            same schedule; `learning_rate` if not given. If given, AdamW steps them.
    """

    use_muon: bool = field(
        default=False, metadata={"help": "Muon for the matrices of the blocks, AdamW for everything else."}
    )
    muon_learning_rate: float = field(
        default=0.02,
        metadata={"help": "Learning rate of the matrices; learning_rate is that of everything else."},
    )
    embedding_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of embeddings and output layer; learning_rate if not given."},
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's `Muon` and `AdamW` behind one `step`, one list of parameter groups and one state.

    Args:
        matrices (`list[torch.nn.Parameter]`): two-dimensional parameters, stepped by Muon.
        others (`list[dict]`): parameter groups, stepped by AdamW, without weight decay.
        muon_lr (`float`): learning rate of the matrices.
        lr (`float`): learning rate of the groups that have none of their own.
        weight_decay (`float`): decoupled weight decay of the matrices.
        betas (`tuple[float, float]`), eps (`float`): AdamW's.
    """

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[dict[str, Any]],
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
        for part, groups in ((self._muon, self.param_groups[:1]), (self._adamw, self.param_groups[1:])):
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss


def build(
    model: torch.nn.Module,
    muon_lr: float | None,
    lr: float,
    embedding_lr: float | None,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """The optimizer for `model`, with weight decay for the matrices of its blocks only.

    Args:
        model: the trained model; what needs no gradient is left out.
        muon_lr: learning rate of Muon for the matrices of the blocks; AdamW with `lr` steps them if `None`.
        lr: learning rate of everything else.
        embedding_lr: learning rate of embeddings and output layer; `lr` if `None`.
        weight_decay, betas, eps: as of torch's optimizers.

    Raises:
        UserError: If there is nothing that an argument is about (with LoRA, say, which trains no embeddings).
    """
    tables = {
        id(parameter)
        for name in ("get_input_embeddings", "get_output_embeddings")
        if (module := getattr(model, name, lambda: None)()) is not None
        for parameter in module.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in tables]
    embeddings = [p for p in trained if id(p) in tables]
    vectors = [p for p in trained if p.ndim != 2 and id(p) not in tables]
    if embedding_lr is not None and not embeddings:
        remedy = "no embeddings are trained; leave it out"
        raise UserError(Problem("embedding_learning_rate", embedding_lr, remedy))
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "lr": lr if embedding_lr is None else embedding_lr},
        {"params": vectors, "lr": lr},
    ]
    others = [group for group in groups if group["params"]]
    if muon_lr is None:
        blocks = {"params": matrices, "lr": lr, "weight_decay": weight_decay}
        return torch.optim.AdamW([blocks, *others], lr=lr, weight_decay=0.0, betas=betas, eps=eps)
    if not matrices or not others:
        raise UserError(Problem("use_muon", True, "needs both matrices and other parameters to train; set it to false"))
    return MuonWithAdamW(matrices, others, muon_lr, lr, weight_decay, betas, eps)


def optimizer_cls_and_kwargs(
    args: TrainingArguments, optimizer_args: OptimizerArguments
) -> tuple[Any, dict[str, Any]] | None:
    """What a `Trainer` takes under this name: a factory of the optimizer, or `None` for the one `args.optim` names."""
    if not optimizer_args.use_muon and optimizer_args.embedding_learning_rate is None:
        return None
    settings = {
        "muon_lr": optimizer_args.muon_learning_rate if optimizer_args.use_muon else None,
        "lr": args.learning_rate,
        "embedding_lr": optimizer_args.embedding_learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return (lambda: build), settings
