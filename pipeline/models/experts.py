"""The experts of a Llama 4: the cost of a token, which experts take which tokens, and losses that balance them."""

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextExperts, Llama4TextModel

from pipeline import hardware


def routers(model: nn.Module) -> list[Llama4Router]:
    """Return the routers of a model, one for each layer with experts; [] if it is dense."""
    return [module for module in model.modules() if isinstance(module, Llama4Router)]


def active_parameters(model: nn.Module) -> int:
    """Return the number of parameters used for a token: all except the experts that it is not routed to."""
    total = _count_parameters(model)
    # How many experts a token is routed to, by the number of experts in a layer.
    experts_of_token = {router.num_experts: router.top_k for router in routers(model)}
    for module in model.modules():
        if isinstance(module, Llama4TextExperts):
            size = _count_parameters(module)
            active = size * experts_of_token[module.num_experts] // module.num_experts
            total -= size - active
    return total


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def training_flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Return the floating-point operations that training a decoder spends on one token of sequences of `length`.

    Six for each matrix weight that the token passes (Kaplan et al., 2020, "Scaling Laws for Neural Language Models",
    section 2.1), and twelve for each layer, channel and attended position (Chowdhery et al., 2022, "PaLM", appendix B),
    halved because attention is causal. A length of 0 excludes attention.
    """
    config = model.config.get_text_config()
    weights = active_parameters(model)
    # An embedding lookup multiplies nothing, but a tied matrix does as the output layer.
    if not config.tie_word_embeddings:
        weights -= _count_parameters(model.get_input_embeddings())
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # In some layers of a Llama 4, tokens only attend within their chunk of the row.
    chunk = getattr(config, "attention_chunk_size", None) or length
    layer_types = getattr(config, "layer_types", None) or []
    chunked_layers = layer_types.count("chunked_attention")
    whole_layers = config.num_hidden_layers - chunked_layers
    # Attended positions, summed over layers.
    attended = whole_layers * length + chunked_layers * min(length, chunk)
    return 6 * weights + 12 * attended * config.num_attention_heads * head_size / 2


def assign_experts(router: Llama4Router, logits: Tensor) -> Tensor:
    """Return 1 where a token goes to an expert and 0 elsewhere. The result and `logits` are (tokens, experts)."""
    return torch.zeros_like(logits).scatter_(1, logits.topk(router.top_k, dim=1).indices, 1.0)


def balancing_loss(router: Llama4Router, logits: Tensor, rows: int) -> Tensor:
    """Return the load-balancing loss of a layer (Fedus et al. 2021, "Switch Transformers", eq. 4): 1 if balanced.

    The loss is computed for each row, and averaged: experts that are only balanced over a batch may each take the texts
    of one kind. Unlike in transformers' `load_balancing_loss_func`, layers are not pooled: two skewed layers could
    cancel out.

    Args:
        logits: The logits of the router, shape (tokens, experts).
        rows: Number of rows, of equal length, into which the tokens are divided.
    """
    # The share of tokens is a count and has no gradient. The router learns through the mean probability.
    shares = assign_experts(router, logits.detach()).view(rows, -1, router.num_experts).mean(1) / router.top_k
    probabilities = logits.float().softmax(-1).view(rows, -1, router.num_experts).mean(1)
    return router.num_experts * (shares * probabilities).sum(-1).mean()


class RouteCounter(ExitStack):
    """Counts how many tokens, without padding, each expert of a model takes; a context manager limits the counting.

    With `training`, only forward passes in training mode count. A forward pass that is computed again, for activation
    checkpointing, counts twice, which does not change any share.

    Attributes:
        counts: Tokens of each expert since the last `clear`, shape (layers, experts); (0, 0) if there are no experts.
        entropy: Entropy of the routers' distributions summed over these tokens, in nats, shape (layers,).
    """

    def __init__(self, model: nn.Module, *, training: bool = False) -> None:
        super().__init__()
        self.routers = routers(model)
        self.training = training
        # Mask of the current forward pass's tokens that are not padding, shape (tokens,); None if unknown.
        self._real: Tensor | None = None
        self.clear()
        for layer, router in enumerate(self.routers):
            self.enter_context(router.register_forward_hook(functools.partial(self._count, layer)))
        for module in model.modules():
            if self.routers and isinstance(module, Llama4TextModel):
                self.enter_context(module.register_forward_pre_hook(self._find_padding, with_kwargs=True))

    def clear(self) -> None:
        """Reset all counts."""
        experts = self.routers[0].num_experts if self.routers else 0
        self.counts = torch.zeros(len(self.routers), experts, dtype=torch.float64)
        self.entropy = torch.zeros(len(self.routers), dtype=torch.float64)

    @property
    def shares(self) -> list[list[float]]:
        """For each layer, the tokens of each expert divided by its fair number of tokens; [] before any token."""
        if not self.counts.any():
            return []
        return (self.counts / self.counts.mean(1, keepdim=True)).tolist()

    def _find_padding(self, model: Llama4TextModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember which tokens are padding; a hook before the forward pass of the whole model."""
        ids = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        if ids is None:
            self._real = None
            return
        real = torch.ones_like(ids, dtype=torch.bool)
        if model.padding_idx is not None:
            real = ids != model.padding_idx
        # Masks of other shapes separate documents, and do not mark padding.
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            real = real & mask.bool()
        self._real = real.flatten()

    @torch.no_grad()
    def _count(self, layer: int, router: Llama4Router, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        """Add the tokens of a forward pass to the counts; a hook after the router of a layer."""
        if self.training and not router.training:
            return
        logits = outputs[1].float()
        # The totals move to the device with the first batch.
        if self.counts.device != logits.device:
            dtype = hardware.sum_dtype(logits.device)
            self.counts = self.counts.to(logits.device, dtype)
            self.entropy = self.entropy.to(logits.device, dtype)
        log_probs = logits.log_softmax(-1)
        assigned = assign_experts(router, logits)
        negative_entropy = log_probs.exp() * log_probs
        if self._real is not None and len(self._real) == len(logits):
            # Selecting rows, or moving the sums to the CPU, would make the CPU wait for a GPU.
            padding = ~self._real[:, None]
            assigned = assigned.masked_fill(padding, 0)
            negative_entropy = negative_entropy.masked_fill(padding, 0)
        self.counts[layer] += assigned.sum(0)
        self.entropy[layer] -= negative_entropy.sum()


@torch.inference_mode()
def preferred_experts(model: PreTrainedModel, ids: Sequence[int]) -> list[list[int]]:
    """Return, for each layer with experts, the expert that the router prefers for each token of a text."""
    output = model(torch.tensor([list(ids)], device=model.device), use_cache=False, output_router_logits=True)
    return [logits.argmax(-1).tolist() for logits in output.router_logits]


def least_fair_share(shares: Sequence[Sequence[float]]) -> float:
    """Return the load furthest from fair: 2 is twice the fair share of the tokens, 0.5 half of it.

    `shares` are as in `RouteCounter`, with at least one layer.
    """

    def fairness(share: float) -> float:
        return min(share, 1 / share) if share else 0.0

    return min((share for layer in shares for share in layer), key=fairness)
