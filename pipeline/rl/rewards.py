"""Reward models as reward functions."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import Problem, UserError
from pipeline.models.kernels.token_trees import share_beginnings
from pipeline.models.tokenizer import escape_tokens, special_tokens


class RewardModel:
    """A sequence classifier with one label, perhaps wrapped or compiled, as a reward function.

    It reads a truncated completion without the end of turn that the chat template would add. Special tokens in a
    completion are encoded as text, so that it cannot forge a turn.

    Args:
        model: The classifier, on its device.
        tokenizer: The classifier's tokenizer, with its chat template.
        ends: Token ids that end a turn of the policy.
        template: Further arguments of the chat template, such as `enable_thinking`.
        name: The name of the reward in messages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        template: Mapping[str, Any],
        name: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.ends = ends
        self.template = template
        self.name = name
        self._special = special_tokens(tokenizer)
        share_beginnings(model)

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """Return the score of each completion.

        Args:
            prompts: A list of messages each, or a text.
            completions: Of the same kind as the prompts.
            completion_ids: The tokens of each completion, which say whether it has ended.

        Raises:
            UserError: If a score is NaN or infinite. TRL would take NaN for "not scored", and learn from the rest.
        """
        texts = []
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
            if isinstance(prompt, str):
                texts.append(prompt + completion)
            else:
                ended = len(ids) > 0 and ids[-1] in self.ends
                texts.append(self.render(prompt + completion, ended))
        batch = self.tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="right")
        scores = self.model(**batch.to(next(self.model.parameters()).device)).logits[:, 0].float()
        broken = scores[~scores.isfinite()]
        if len(broken):
            remedy = f"gave {broken[0]:g} for {len(broken)} of {len(scores)} completions; give another reward model"
            raise UserError(Problem("reward_model_path", self.name, remedy))
        return scores.tolist()

    def render(self, messages: list[dict[str, Any]], ended: bool) -> str:
        """Return a conversation's text, without what the template adds to a last turn that has not ended."""
        conversation = escape_tokens(messages, self._special)
        options = {"tokenize": False, **self.template}
        # A template that omits parts of a message may omit its end.
        with suppress(ValueError):
            return self.tokenizer.apply_chat_template(conversation, continue_final_message=not ended, **options)
        return self.tokenizer.apply_chat_template(conversation, **options)
