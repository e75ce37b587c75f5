"""TRL's `GRPOTrainer` with exact resumption, evaluation without side effects, a faster sampler and, on CPUs, cheaper
log-probabilities. `pipeline.rl.ppo` builds on it, too."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import GenerationConfig, PreTrainedModel, set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl import GRPOTrainer as TRLGRPOTrainer
from trl import SyncRefModelCallback
from trl.extras.profiling import profiling_context

from pipeline import hardware, launch
from pipeline.models.adapters import MERGED
from pipeline.models.kernels.length_groups import group_by_length
from pipeline.models.kernels.sampler import accepts_argument, overrides_generate, sample, unsupported_settings
from pipeline.models.loading import avoid_emulation
from pipeline.models.tokenizer import as_text, special_tokens
from pipeline.models.vllm_sampler import LENGTH_THAT_FITS
from pipeline.rewards.loading import guard_reward
from pipeline.rl.alarms import CollapseAlarms
from pipeline.rl.log_probs import token_log_probs, with_positions
from pipeline.rl.reference_model import frozen_copy
from pipeline.rl.rollouts import EpochSampler, keep_frozen_weights, load_rollout, load_rollout_state, save_rollout
from pipeline.rl.value_adapter import compute_in_float32
from pipeline.training.divergence import stop_on_broken_rewards, stop_on_failing_rewards
from pipeline.training.reliable import Reliable

logger = get_logger(__name__)

MAX_LOGITS = 1 << 26
"""Maximum number of logits in one tensor on a CPU (256 MiB in float32)."""


class GRPOTrainer(Reliable, TRLGRPOTrainer):
    """TRL's `GRPOTrainer`, but resumed exactly wherever it stopped.

    TRL samples anew after a resume, although a rollout may serve several steps (`steps_per_generation` above
    `gradient_accumulation_steps`, or `num_iterations` above 1), and it starts a later epoch of prompts in the order of
    the first. Here, a checkpoint contains what is left of the rollout, one file per process, and the order of an epoch
    depends only on its number. With a different number of processes or batch size, the rollout cannot be used and
    is sampled anew, as by TRL.

    Evaluation, which samples too, uses its own random numbers. Its metrics are among those that `evaluate` returns,
    under the prefix of their data set. Every completion counts equally, also in an incomplete last batch.

    A reward function with weight 0 is measured and logged without any other effect, for completions that another
    reward function has scored. Every reward function gets its own copy of completions and columns. A reward model reads
    a completion that was cut off as it stands, without the end of turn that its chat template adds.

    Completions are sampled by `pipeline.models.kernels.sampler`, from the global random numbers, which checkpoints
    contain. TRL samples where that cannot (`_sampling_config`), by a `generate` that the model's class overrides or
    that was put on the model, and with vLLM, whose probabilities depend on what else is in its batch: a resumed run
    goes on with the rollout of its checkpoint, but then samples other completions.

    The collapse of the policy is named in the log (`pipeline.rl.alarms`).
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **kwargs: Any) -> None:
        if args is not None:
            launch.use_one_gpu(args)
            if isinstance(model, str):
                args.model_init_kwargs = {"device_map": None} | (args.model_init_kwargs or {})
        merged = args is not None and args.beta != 0 and hasattr(model, MERGED) and not kwargs.get("peft_config")
        beta, synced = (args.beta, args.sync_ref_model) if merged else (0.0, False)
        if args is not None and args.use_vllm and args.vllm_max_model_length is None:
            args.vllm_max_model_length = LENGTH_THAT_FITS
        if merged:  # TRL would make the reference by loading the policy's name again, which is that of the base model
            args.beta, args.sync_ref_model = 0.0, False
        super().__init__(model, reward_funcs, args, *others, **kwargs)
        self.parts.append(Rollout(self))
        if self.args.cast_lm_head_to_fp32:
            for network in (self.model, self.ref_model):
                if network is not None:
                    compute_in_float32(extract_model_from_parallel(network).get_output_embeddings())
        if merged:
            self.beta = args.beta = beta
            args.sync_ref_model = synced
            self._copy_reference()
            if synced:
                self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))
        if self.use_vllm:
            # Inside this process, vLLM draws from the global random numbers, which its start seeds by the rank alone.
            set_seed(self.args.seed + self.accelerator.process_index // self.args.vllm_tensor_parallel_size)
            if isinstance(self.model, PeftModel) and self._whole_and_bare:
                keep_frozen_weights(self.vllm_generation)
            logger.info("%-11s vLLM (%s); a resumed run is not exact to the bit", "sampling", self.args.vllm_mode)
        judges = zip(self.reward_funcs, self.reward_weights.tolist(), strict=True)
        self.add_callback(CollapseAlarms(checked=not any(w and isinstance(f, nn.Module) for f, w in judges)))
        for function in self.reward_funcs:
            if isinstance(function, PreTrainedModel):
                avoid_emulation(function)
                group_by_length(function)
        self.reward_funcs: list[Any] = [
            function if isinstance(function, nn.Module) else guard_reward(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]

    def _copy_reference(self) -> None:
        """Make the reference a copy of the policy.

        Raises:
            ValueError: Under FSDP or DeepSpeed, which would leave the copy unsharded.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed do not shard the reference of a model that was merged in memory")
        reference = frozen_copy(self.model, self.temperature, self.args.cast_lm_head_to_fp32)
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    # ---- The rollout

    def get_train_dataloader(self) -> DataLoader:
        """Leave rows where they are: accelerate would look for tensors to move in every text of every column."""
        if isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()  # this setting would also change how a stream is split
        placed, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.device_placement = placed

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return EpochSampler(super()._get_train_sampler(dataset), lambda: self.state.epoch)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Sample with `pipeline.models.kernels.sampler.sample`, without dropout, where it can do what is asked."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        config = self._sampling_config(model)
        if config is None:
            with self.accelerator.autocast():  # trained modules are in float32, and frozen ones maybe in bf16
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        training = model.training
        model.eval()
        try:
            with profiling_context(self, "sample"), self.accelerator.autocast():  # once, so that weights are cast once
                return sample(model, prompt_ids, config), None
        finally:
            model.train(training)

    def _sampling_config(self, model: Any) -> GenerationConfig | None:
        """Return the settings for `sample`, or None if TRL has to sample.

        TRL does for vLLM, continuous batching, models that see, weights that are not `_whole_and_bare`, models that do
        not take positions (Mamba, for one) or have a `generate` of their own, and settings that `sample` does not have.
        """
        if self.use_vllm or self.use_transformers_continuous_batching or self._is_vlm or not self._whole_and_bare:
            return None
        if not accepts_argument(model, "position_ids") or overrides_generate(model):
            return None
        config = copy.deepcopy(self.generation_config)
        config.update(**model.generation_config.to_dict(), defaults_only=True)  # as `model.generate` does
        return None if unsupported_settings(config) else config

    @property
    def _whole_and_bare(self) -> bool:
        """Whether the weights are not sharded (FSDP, DeepSpeed), and no adapter puts tokens before the prompt."""
        model = self.model
        prefixed = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled or prefixed)

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        """Return the rewards (completions of all processes, functions).

        A completion that no function with a weight scored gets no score at all. TRL would take it as scored with 0
        because of a function that is only measured.

        Raises:
            RunStopped: If a reward is not a number, or its function fails (`pipeline.training.divergence`).
        """
        ended = [bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids_list]
        tokenizers = self.reward_processing_classes
        self.reward_processing_classes: list[Any] = [TextsAsTheyStand(tokenizer, ended) for tokenizer in tokenizers]
        try:
            with stop_on_failing_rewards(self):
                rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_processing_classes = tokenizers
        stop_on_broken_rewards(self, rewards)
        weights = self.reward_weights.to(rewards.device)
        rewards[rewards[:, weights != 0].isnan().all(dim=1)] = torch.nan
        if self.model.training:
            totals = (rewards * weights).nansum(dim=1)[~rewards.isnan().all(dim=1)].tolist()
            self._metrics["train"]["reward_max"].append(max(totals, default=math.nan))
        return rewards

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """On a CPU, compute logits for the completion only: TRL's tiles save memory, but take several times as long.

        Either way, positions are counted from each text's first token, as during sampling. TRL counts the padding, too,
        which changes what a model with learned positions computes.
        """
        rows = batch_size or len(input_ids)
        size = rows * logits_to_keep * self.model.config.get_text_config().vocab_size
        plain = input_ids.device.type == "cpu" and size <= MAX_LOGITS and self._whole_and_bare
        asked = any(value is not None and value is not False for value in others.values())
        if not plain or asked or not accepts_argument(model, "logits_to_keep"):
            positioned = model if self._is_vlm else with_positions(model)
            return super()._get_per_token_logps_and_entropies(
                positioned, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )
        log_probs, entropies = token_log_probs(
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=batch_size,
            temperature=self.temperature,
            entropy=compute_entropy,
            entropy_gradient=self._entropy_bonus_enabled,
            autocast=self.accelerator.autocast,
        )
        return log_probs, entropies, None

    # ---- Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate under a fixed random state, and restore training's state afterwards."""
        self._evaluated: list[int] = []
        with hardware.unchanged_rng():
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._evaluation_means().items()})
        self._metrics["eval"].clear()  # TRL would log them under the prefix "eval", whatever the data set is called
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            rows = torch.tensor(len(batch["completion_ids"]), device=self.accelerator.device)
            self._evaluated.append(int(self.accelerator.reduce(rows, reduction="sum")))
        return batch

    def _evaluation_means(self) -> dict[str, float | None]:
        """Average what was measured in each batch of an evaluation, by name; None where nothing was."""
        means: dict[str, float | None] = {}
        for name, values in self._metrics["eval"].items():
            # A mean over the whole evaluation is one value already, and a reward function that logs metrics of its own
            # may skip batches.
            rows = self._evaluated if len(values) == len(self._evaluated) else [1] * len(values)
            known = [(value, count) for value, count in zip(values, rows, strict=True) if not math.isnan(value)]
            total = sum(count for _, count in known)
            means[name] = sum(value * count for value, count in known) / total if total else None
        return means

    # ---- Checkpoints: see `Rollout`

    def _rollout_layout(self) -> dict[str, int]:
        """Return the sizes that determine how a rollout is split; a resumed run must use the same ones."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
        return {"processes": self.accelerator.num_processes} | {name: getattr(self.args, name) for name in names}

    def _rollout_state(self) -> dict[str, Any]:
        """Return what the next step depends on besides the rollout, as JSON can represent it."""
        return {"layout": self._rollout_layout(), "step": self._step, "metrics": self._metrics["train"]}

    def _restore_rollout_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._metrics["train"].update(state["metrics"])


class Rollout:
    """A part of checkpoints (`pipeline.training.reliable`): what is left of a rollout, in one file per process."""

    belongs_to_model = False

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer

    def save(self, folder: Path) -> None:
        """Write the rollout, unless only the model is saved."""
        trainer = self.trainer
        if trainer.args.save_only_model:
            return
        steps_per_rollout = trainer.args.steps_per_generation * trainer.num_iterations
        in_use = trainer._step % steps_per_rollout != 0  # otherwise the next step samples a new one
        batches = (trainer._buffered_inputs or []) if in_use else []
        save_rollout(_rollout_file(folder, trainer.accelerator.process_index), batches, trainer._rollout_state())

    def load(self, folder: Path) -> None:
        """Go on with the rollout of a checkpoint if it was split as this run would split it."""
        trainer = self.trainer
        if not os.path.isfile(_rollout_file(folder, 0)):
            return
        # The first process's file decides for all: if some sampled anew and others did not, they would wait forever.
        state = load_rollout_state(_rollout_file(folder, 0))
        if state.get("layout") == trainer._rollout_layout():
            own = _rollout_file(folder, trainer.accelerator.process_index)
            trainer._buffered_inputs = load_rollout(own, trainer.accelerator.device) or None
            state = load_rollout_state(own)
        else:
            logger.warning("%s: its rollout is sampled anew: it was split by %s", folder, state.get("layout"))
            state["step"] = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        trainer._restore_rollout_state(state)


class TextsAsTheyStand:
    """The tokenizer of a reward model, which renders conversations without an end of turn if the policy did not end it.

    A completion that spells a special token, piece by piece, is encoded as text, so that it cannot forge a turn.

    Args:
        tokenizer: The tokenizer; None for a reward function, which does not use it.
        ended: Whether the policy ended its turn, for each conversation in the order of rendering.
    """

    def __init__(self, tokenizer: Any, ended: Iterable[bool]) -> None:
        self.tokenizer, self.ended = tokenizer, iter(ended)
        self.tokens = special_tokens(tokenizer) if tokenizer is not None else re.compile("")

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Render a conversation, and leave out what the template adds after a content that was cut off."""
        messages = as_text(messages, self.tokens)
        text = self.tokenizer.apply_chat_template(messages, **options)
        if next(self.ended):
            return text
        marked = self.tokenizer.apply_chat_template([*messages[:-1], {**messages[-1], "content": "MARK"}], **options)
        _, found, end = marked.rpartition("MARK")
        return text.removesuffix(end) if found else text

    def __call__(self, **options: Any) -> Any:
        return self.tokenizer(**options)


def _rollout_file(checkpoint: Path, process: int) -> str:
    return str(checkpoint / f"rollout_{process}.safetensors")
