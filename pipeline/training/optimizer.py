"""Optimizers that treat matrices, embeddings and other parameters differently, for any `Trainer`.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of each matrix of the
transformer blocks (`pipeline.models.kernels.muon`). AdamW updates embeddings, norms and everything else. Embeddings can
have their own learning rate: AdamW moves each number by about the learning rate, whatever its size, so the embedding of
a token that never occurs in the data would move as far as all others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from pipeline.data.arguments import option
from pipeline.models.kernels.muon import Muon


@dataclass
class OptimizerArguments:
    """Optimizers per kind of parameter. By default, the trainer's own optimizer (`optim`) updates all parameters.

    All learning rates follow the schedule of `learning_rate`. `muon_learning_rate` is the spectral norm of an update of
    a matrix with at most as many rows as columns. With `embedding_learning_rate`, AdamW updates all other parameters.
    """

    use_muon: bool = option(False, "Use Muon for the matrices in the blocks, and AdamW for everything else.")
    muon_learning_rate: float = option(0.02, "Learning rate of Muon; learning_rate is for everything else.")
    embedding_learning_rate: float | None = option(
        None, "Learning rate of embeddings and output layer (default: learning_rate)."
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """`Muon` and torch's `AdamW` as one optimizer, with a common `step`, list of parameter groups and state."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self._muon = muon
        self._adamw = adamw
        # Some schedules read the learning rate from the defaults.
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={"lr": adamw.defaults["lr"]})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with both optimizers."""
        # Loading a checkpoint replaces groups and state, so both optimizers get the current ones. Muon has one group.
        self._muon.param_groups = self.param_groups[:1]
        self._adamw.param_groups = self.param_groups[1:]
        for part in (self._muon, self._adamw):
            part.state = self.state
            part.step()


def build_optimizer(
    model: torch.nn.Module, args: TrainingArguments, optimizer_args: OptimizerArguments
) -> torch.optim.Optimizer:
    """Build the optimizer of a model, with weight decay only for the matrices of its blocks.

    Muon or AdamW updates these, and AdamW everything else. Parameters that do not require gradients are skipped.
    """
    embedding_rate = optimizer_args.embedding_learning_rate
    if embedding_rate is None:
        embedding_rate = args.learning_rate
    matrices, embeddings, vectors = _parameters_by_kind(model)
    # torch rejects a group without parameters.
    groups: list[dict[str, Any]] = []
    if not optimizer_args.use_muon:
        groups.append({"params": matrices, "lr": args.learning_rate, "weight_decay": args.weight_decay})
    if embeddings:
        groups.append({"params": embeddings, "lr": embedding_rate})
    if vectors:
        groups.append({"params": vectors, "lr": args.learning_rate})
    # Weight decay is for matrices, which are in Muon or in AdamW's first group.
    betas = (args.adam_beta1, args.adam_beta2)
    adamw = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=0.0, betas=betas, eps=args.adam_epsilon)
    if not optimizer_args.use_muon:
        return adamw
    return MuonWithAdamW(Muon(matrices, lr=optimizer_args.muon_learning_rate, weight_decay=args.weight_decay), adamw)


def _parameters_by_kind(model: torch.nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the trained matrices of the blocks, the embeddings (with the output layer), and all other parameters."""
    # Tied embeddings are one parameter with two names.
    tables: set[int] = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, name)() if hasattr(model, name) else None
        if layer is not None:
            tables.update(id(parameter) for parameter in layer.parameters())
    # The weights of experts are stacks of matrices, with three dimensions.
    stacks: set[int] = set()
    for module in model.modules():
        if isinstance(module, Llama4TextExperts):
            stacks.update(id(parameter) for parameter in module.parameters())
    matrices: list[Any] = []
    embeddings: list[Any] = []
    vectors: list[Any] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            embeddings.append(parameter)
        elif parameter.ndim == 2 or id(parameter) in stacks:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    return matrices, embeddings, vectors


def optimizer_cls_and_kwargs(
    args: TrainingArguments, optimizer_args: OptimizerArguments
) -> tuple[Any, dict[str, Any]] | None:
    """Return the argument of this name for a `Trainer`; None selects the optimizer that `args.optim` names."""
    if not optimizer_args.use_muon and optimizer_args.embedding_learning_rate is None:
        return None
    # `Trainer` calls a factory without arguments, and what that returns with the model and these arguments.
    return (lambda: build_optimizer), {"args": args, "optimizer_args": optimizer_args}
