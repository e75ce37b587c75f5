"""Instruction tuning with TRL's `SFTTrainer`, which computes less for the same loss."""

from __future__ import annotations

from typing import Any

import trl

from pipeline.models.kernels.attention import choose_attention
from pipeline.models.kernels.output_layer import project_labelled_positions
from pipeline.models.kernels.packed_rows import PackedRows, pads_rows
from pipeline.training.reliable import Reliable


class SFTTrainer(Reliable, trl.SFTTrainer):
    """TRL's `SFTTrainer` with three kernels, each of them optional, and the attention that was requested, if any."""

    def __init__(self, *args: Any, attn_implementation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TRL does not accept a collator as an argument if it packs.
        if pads_rows(self.args, self.model.config):
            self.data_collator = PackedRows(self.processing_class.pad_token_id, return_position_ids=True)
        project_labelled_positions(self.model)
        choose_attention(self.model, attn_implementation)
