"""The critic of PPO, with the optimizer that trains it.

transformers' `Trainer` zeroes, clips and steps the policy; `Critic.step` does the same for the critic, once the
gradients of all micro-batches of an optimizer step are there.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from pipeline.errors import Problem, UserError
from pipeline.models.kernels.token_trees import ForwardPass, compute_in_passes

# Subfolder of a checkpoint or an output directory that contains the critic.
VALUE_MODEL_FOLDER = "value_model"
# File of a checkpoint with the state of the critic's optimizer.
STATE = "critic_optimizer.pt"


class Critic:
    """A value model and its training. It is part of checkpoints and of the final model, in `value_model/`.

    Args:
        model: The value model, without wrappers.
        policy: The policy, whose adapter may share frozen weights with the critic.
        accelerator: Wraps the model for several processes, `torch.compile` and autocast.
        max_grad_norm: Its gradients are clipped to this norm, separately: large ones of the policy do not shrink them.

    Attributes:
        model: The value model, wrapped.
        optimizer: Set by `PPOTrainer.create_optimizer` when training begins.
    """

    belongs_to_model = True

    def __init__(
        self, model: PreTrainedModel | PeftModel, policy: nn.Module, accelerator: Accelerator, max_grad_norm: float
    ) -> None:
        self.policy = policy
        self.accelerator = accelerator
        self.max_grad_norm = max_grad_norm
        self.model: Any = accelerator.prepare_model(model)
        self.optimizer: Any = None

    @property
    def bare(self) -> Any:
        """The model without wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def step(self, share: float) -> float:
        """Take a step, and return the gradient norm before clipping.

        Args:
            share: The learning rate, as a share of its peak.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
        # The loss scale of fp16 is updated after the policy's step, which comes next.
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        # As in `Trainer`, 0 disables clipping.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm or math.inf)
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        self.model.zero_grad()
        return norm.item()

    def save(self, folder: Path) -> None:
        """Save the model, without PEFT's draft of a card, which contains paths of this machine."""
        self.bare.save_pretrained(str(folder / VALUE_MODEL_FOLDER))
        (folder / VALUE_MODEL_FOLDER / "README.md").unlink(missing_ok=True)

    def load(self, folder: Path) -> None:
        """Load the model that `save` has written to a folder.

        Raises:
            ValueError: If there is none.
            UserError: If the saved model is an adapter and this one is not, or the other way round.
        """
        path = folder / VALUE_MODEL_FOLDER
        model = self.bare
        policy = self.policy
        if not path.is_dir():
            raise ValueError(f"{folder} does not contain {VALUE_MODEL_FOLDER}/: PPOTrainer did not save it")
        is_adapter = (path / "adapter_config.json").is_file()
        if is_adapter != isinstance(model, PeftModel):
            remedy = f"{folder} was trained with {str(is_adapter).lower()}; use that value"
            raise UserError(Problem("value_use_peft", not is_adapter, remedy))
        if not is_adapter:
            saved = type(model).from_pretrained(path, config=model.config, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())
            return
        # When transformers loaded the policy, it took the critic's adapter for another one of the policy.
        if isinstance(policy, PeftModel) and VALUE_MODEL_FOLDER in policy.peft_config:
            policy.delete_adapter(VALUE_MODEL_FOLDER)
        set_peft_model_state_dict(model, load_peft_weights(str(path)), adapter_name=model.active_adapter)


@dataclass
class CriticOptimizer:
    """The state of the critic's optimizer, as a part of checkpoints."""

    critic: Critic
    args: TrainingArguments
    belongs_to_model: ClassVar[bool] = False

    def save(self, folder: Path) -> None:
        """Save the state, unless only the models are saved."""
        if self.args.should_save and not self.args.save_only_model:
            torch.save({"optimizer": self.critic.optimizer.state_dict()}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Load the state, if there is one. Raise a `UserError` if the folder only has the policy's optimizer state."""
        if (folder / STATE).is_file():
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            self.critic.optimizer.load_state_dict(state["optimizer"])
        elif (folder / "optimizer.pt").is_file():
            raise UserError(Problem("resume_from_checkpoint", folder, f"lacks {STATE}; copy it whole, or start again"))


def token_values(critic: nn.Module, ids: Tensor, attention_mask: Tensor, length: int, *options: Any) -> Tensor:
    """Return a critic's estimates (B, `length`) before each of the last `length` tokens is chosen, in float32.

    Args:
        critic: A token classification model with one label, wrapped or not.
        ids: Token ids of whole texts, (B, L).
        attention_mask: 0 for padding, (B, L).
        length: Number of tokens at the end of each text, for which estimates are returned.
        *options: Further arguments of `pipeline.models.kernels.token_trees.compute_in_passes`.
    """

    def of_pass(critic: nn.Module, batch: ForwardPass) -> tuple[Tensor]:
        return (critic(**batch.inputs).logits.flatten(0, 1).index_select(0, batch.predecessors)[:, 0].float(),)

    (values,) = compute_in_passes(of_pass, critic, ids, attention_mask, length, *options)
    return values
