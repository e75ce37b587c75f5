"""TRL's trainers for instructions and for preferences: cheaper steps of the same loss, and the right reference."""

from __future__ import annotations

import copy
from typing import Any

import trl
from datasets import IterableDataset
from transformers import PreTrainedModel

from pipeline.errors import Problem, UserError
from pipeline.models.adapters import MERGED
from pipeline.models.kernels.attention import choose_attention
from pipeline.models.kernels.output_layer import project_labelled_positions
from pipeline.models.kernels.packed_rows import PackedRows
from pipeline.training.reliable import Reliable


class SFTTrainer(Reliable, trl.SFTTrainer):
    """TRL's `SFTTrainer` with three kernels, each of them optional, and the attention that was requested, if any."""

    def __init__(self, *args: Any, attn_implementation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        packs = self.args.packing and self.args.packing_strategy != "wrapped" and not self.args.pad_to_multiple_of
        # TRL does not accept a collator as an argument if it packs. FlashAttention expects its flattened rows.
        if packs and "flash" not in (self.model.config._attn_implementation or ""):
            self.data_collator = PackedRows(self.processing_class.pad_token_id, return_position_ids=True)
        project_labelled_positions(self.model)
        choose_attention(self.model, attn_implementation)


class RewardTrainer(Reliable, trl.RewardTrainer):
    """TRL's `RewardTrainer`, for pairs of answers."""


class WithReference(Reliable):
    """A trainer of TRL with the right reference, and with the attention that suits the machine for both models.

    The reference is the policy as it was before training. TRL loads it by the name of the policy or, under LoRA,
    disables the adapter. A policy that was merged in memory has the name of its base model, without the adapter that it
    started from: it is copied. `attn_implementation` is the attention if one was requested.
    """

    def __init__(self, model: Any, args: Any, attn_implementation: str | None = None, **kwargs: Any) -> None:
        if args.precompute_ref_log_probs and isinstance(kwargs["train_dataset"], IterableDataset):
            remedy = "needs rows that are read twice; turn dataset_streaming off, or omit it"
            raise UserError(Problem("precompute_ref_log_probs", True, remedy))
        if isinstance(model, PreTrainedModel) and hasattr(model, MERGED) and not kwargs.get("peft_config"):
            kwargs["ref_model"] = copy.deepcopy(model).requires_grad_(False).eval()
        super().__init__(model, args=args, **kwargs)
        choose_attention(self.model, attn_implementation)
        if self.ref_model is not None:
            # Before the first step, policy and reference are equal to the bit.
            self.ref_model.set_attn_implementation(self.model.config.get_text_config()._attn_implementation)


class DPOTrainer(WithReference, trl.DPOTrainer):
    """TRL's `DPOTrainer`, for pairs of answers."""


class KTOTrainer(WithReference, trl.KTOTrainer):
    """TRL's `KTOTrainer`, for single answers that are wanted or not.

    TRL reads the rows in order: `load_inputs` has shuffled them. The loss `kto` compares each answer with the KL of the
    policy from the reference. To estimate it, each prompt gets the answer of its neighbour in the batch of a process;
    the estimate is averaged over the processes, and 0 if it is negative. Where it is not, it depends on
    `per_device_train_batch_size` and the number of processes, and two processes do not train as one does. With the loss
    `apo_zero_unpaired`, which has no KL, they do.
    """
