"""TRL's trainers for instructions and preferences, with cheaper steps of the same loss, and the right reference."""

import copy
from typing import Any

import trl
from datasets import IterableDataset
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pipeline.errors import Problem, UserError
from pipeline.models.adapters import MERGED
from pipeline.models.classifiers import find_head
from pipeline.models.kernels.attention import choose_attention
from pipeline.models.kernels.output_layer import project_labelled_positions
from pipeline.models.kernels.packed_rows import PackedRows
from pipeline.models.kernels.token_trees import share_beginnings
from pipeline.training.reliable import Reliable
from pipeline.training.token_loss import token_loss


class SFTTrainer(Reliable, trl.SFTTrainer):
    """TRL's `SFTTrainer` with three optional kernels, and the attention that was requested, if any."""

    def __init__(self, *args: Any, attn_implementation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With packing, TRL takes no collator as an argument.
        if self._packs_rows():
            self.data_collator = PackedRows(self.processing_class.pad_token_id, return_position_ids=True)
        project_labelled_positions(self.model)
        choose_attention(self.model, attn_implementation)

    def _packs_rows(self) -> bool:
        """Return whether several texts share a row, and attention alone tells them apart.

        FlashAttention, and layers other than attention, such as convolutions, need TRL's flattened rows.
        """
        args = self.args
        config = self.model.config
        if not args.packing or args.packing_strategy == "wrapped" or args.pad_to_multiple_of:
            return False
        if "flash" in (config._attn_implementation or ""):
            return False
        layers = DynamicCache(config=config.get_text_config()).layers
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class RewardTrainer(Reliable, trl.RewardTrainer):
    """TRL's `RewardTrainer`, for pairs of answers, with the loss at every token if its weight is not 0."""

    # The weight of the loss at every token.
    token_loss_coef = 0.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Add the loss at every token in training. Evaluations only use the last one, so that they stay comparable."""
        if not (self.token_loss_coef and model.training):
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        # The head scores all tokens, of which transformers returns the last.
        scores: list[Tensor] = []
        _, head = find_head(self.model)
        with head.register_forward_hook(lambda module, arguments, output: scores.append(output)):
            loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        margin = inputs.get("margin", 0.0)
        loss_of_tokens = token_loss(scores[0].squeeze(-1), inputs["input_ids"], inputs["attention_mask"], margin)
        loss = loss + self.token_loss_coef * loss_of_tokens
        return (loss, outputs) if return_outputs else loss


def choose_kernels(trainer: RewardTrainer, attn_implementation: str | None) -> None:
    """Let a reward model compute what the texts of a pair share once, on a CPU, and choose its attention.

    Args:
        trainer: The trainer of the model.
        attn_implementation: The attention that was requested. None for what suits the machine.
    """
    on_cpu = trainer.args.device.type == "cpu"
    if attn_implementation or not on_cpu:
        choose_attention(trainer.model, attn_implementation)
    if on_cpu:
        # Without a limit, texts may be long.
        is_short = 0 < (trainer.args.max_length or 0) <= 512
        share_beginnings(trainer.model, short=is_short and not attn_implementation)


class WithReference(Reliable):
    """A TRL trainer with the right reference, and with the attention that suits the machine for both models.

    The reference is the policy as it was before training. TRL loads it by the policy's name or, with LoRA, disables the
    adapter. A policy that was merged in memory still has the name of its base model, without the merged adapter, so it
    is copied.

    Args:
        model: The policy: a path, a Hub id, or a model.
        args: The trainer's configuration.
        attn_implementation: The attention that was requested. None for the one that suits the machine.
        **kwargs: Any other argument of TRL's trainer.

    Raises:
        UserError: If the reference is to be computed beforehand on a stream, which cannot be read twice.
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
            # Another attention rounds differently, but policy and reference must be equal to the bit before the first
            # step.
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
