"""TRL's trainers for instructions and preferences, with cheaper steps of the same loss, and the right reference."""

import copy
from typing import Any

import trl
from datasets import IterableDataset
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pipeline.errors import Problem, UserError
from pipeline.models.adapters import MERGED
from pipeline.models.kernels.attention import choose_attention
from pipeline.models.kernels.output_layer import project_labelled_positions
from pipeline.models.kernels.packed_rows import PackedRows
from pipeline.training.reliable import Reliable


class SFTTrainer(Reliable, trl.SFTTrainer):
    """TRL's `SFTTrainer` with three optional kernels, and the attention that was requested, if any."""

    def __init__(self, *args: Any, attn_implementation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        packs = self.args.packing and self.args.packing_strategy != "wrapped" and not self.args.pad_to_multiple_of
        layers = DynamicCache(config=self.model.config.get_text_config()).layers
        attends = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        # With packing, TRL takes no collator as an argument. FlashAttention and convolutions need TRL's flattened rows.
        if packs and attends and "flash" not in (self.model.config._attn_implementation or ""):
            self.data_collator = PackedRows(self.processing_class.pad_token_id, return_position_ids=True)
        project_labelled_positions(self.model)
        choose_attention(self.model, attn_implementation)


class RewardTrainer(Reliable, trl.RewardTrainer):
    """TRL's `RewardTrainer`, for pairs of answers."""


class WithReference(Reliable):
    """A TRL trainer with the right reference, and with the attention that suits the machine for both models.

    The reference is the policy as it was before training. TRL loads it by the policy's name or, with LoRA, disables the
    adapter. A policy that was merged in memory still has the name of its base model, without the merged adapter, so it
    is copied. `attn_implementation` is the attention if one was requested.
    """

    def __init__(self, model: Any, args: Any, attn_implementation: str | None = None, **kwargs: Any) -> None:
        if args.precompute_ref_log_probs and isinstance(kwargs["train_dataset"], IterableDataset):
            remedy = "needs to read the rows twice; turn dataset_streaming off, or omit it"
            raise UserError(Problem("precompute_ref_log_probs", True, remedy))
        if isinstance(model, PreTrainedModel) and hasattr(model, MERGED) and not kwargs.get("peft_config"):
            kwargs["ref_model"] = copy.deepcopy(model).requires_grad_(False).eval()
        super().__init__(model, args=args, **kwargs)
        choose_attention(self.model, attn_implementation)
        if self.ref_model is not None:
            # Before the first step, policy and reference must be equal to the bit.
            self.ref_model.set_attn_implementation(self.model.config.get_text_config()._attn_implementation)


class DPOTrainer(WithReference, trl.DPOTrainer):
    """TRL's `DPOTrainer`, for pairs of answers."""


class KTOTrainer(WithReference, trl.KTOTrainer):
    """TRL's `KTOTrainer`, for single answers that are wanted or unwanted.

    TRL reads the rows in order, so `load_inputs` has shuffled them. The loss `kto` compares each answer with the KL of
    the policy from the reference. To estimate it, each prompt gets the answer of its neighbour in the batch of a
    process; the estimate is averaged over the processes, and clipped at 0. Above 0, it depends on
    `per_device_train_batch_size` and the number of processes, so two processes do not train as one would. With the loss
    `apo_zero_unpaired`, which has no KL, they do.
    """
