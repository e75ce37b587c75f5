"""TRL's `GRPOTrainer`: exact resumption, evaluation without side effects, faster sampling and log-probabilities."""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl import GRPOConfig, SyncRefModelCallback
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.extras.profiling import profiling_context
from trl.trainer.utils import is_async_callable

from pipeline import hardware, launch
from pipeline.errors import RunStopped, UserError
from pipeline.models.kernels.log_probs import token_log_probs, with_positions
from pipeline.models.kernels.sampler import accepts_argument, batches, overrides_generate, sample, unsupported_settings
from pipeline.models.loading import avoid_emulation
from pipeline.models.vllm_sampler import LENGTH_THAT_FITS
from pipeline.rewards.loading import guard_reward
from pipeline.rl.alarms import CollapseAlarms
from pipeline.rl.rewards import RewardModel
from pipeline.rl.rollout_state import Rollout
from pipeline.tools.dialogue import Dialogue, call_tool, converse
from pipeline.training.frozen_weights import compute_in_float32, frozen_copy, unrounded
from pipeline.training.reliable import Reliable

logger = get_logger(__name__)


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """TRL's `RepeatSampler`, with an order that only depends on the number of the epoch, which `epoch` returns.

    TRL draws all orders from one generator, so a run resumed in the second epoch would repeat the first order.
    """

    sampler: Any
    epoch: Callable[[], float | None]

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + int(self.epoch() or 0))
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class GRPOTrainer(Reliable, TRLGRPOTrainer):
    """TRL's `GRPOTrainer`, but exactly resumable wherever it stopped.

    A checkpoint contains the rest of the rollout, which TRL would sample again. Only with vLLM, whose probabilities
    depend on the rest of the batch, does a resumed run sample different completions.

    Evaluation, which also samples, uses its own random numbers. `evaluate` returns its metrics under the prefix of
    their data set. Every completion counts equally, even in an incomplete last batch.

    `all_rewards`, (completions, rewards), has the latest rewards of each completion, NaN for None, and `latest_logps`
    has the last log-probabilities, which TRL's loss does not return.
    """

    # Whether the entropies that are computed at the moment are logged, and no part of a loss.
    _only_logs_entropy = False

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, *others: Any, **kwargs: Any
    ) -> None:
        args = args or GRPOConfig()
        launch.use_one_gpu(args)
        if isinstance(model, str):
            args.model_init_kwargs = {"device_map": None} | (args.model_init_kwargs or {})
        if args.use_vllm and args.vllm_max_model_length is None:
            args.vllm_max_model_length = LENGTH_THAT_FITS
        # TRL loads the reference by the policy's name. A model in memory may differ from that, or have no name.
        copied = args.beta != 0 and isinstance(model, PreTrainedModel) and not kwargs.get("peft_config")
        beta, synced = args.beta, args.sync_ref_model
        if copied:
            args.beta, args.sync_ref_model = 0.0, False
        super().__init__(model, reward_funcs, args, *others, **kwargs)
        self.parts.append(Rollout(self))
        for network in filter(None, (self.model, self.ref_model) if args.cast_lm_head_to_fp32 else ()):
            compute_in_float32(extract_model_from_parallel(network).get_output_embeddings())
        if copied:
            self.beta, args.beta, args.sync_ref_model = beta, beta, synced
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("FSDP and DeepSpeed do not shard the reference of a model in memory")
            reference = frozen_copy(self.model, self.temperature, args.cast_lm_head_to_fp32)
            self.ref_model: Any = self.accelerator.prepare_model(reference, evaluation_mode=True)
            if synced:
                self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))

        # Reward models become functions, and functions are guarded. Alarms watch the rewards for a collapse.
        rewards: list[Any] = []
        tokenizers = self.reward_processing_classes
        for function, tokenizer, name in zip(self.reward_funcs, tokenizers, self.reward_func_names, strict=True):
            if isinstance(function, PreTrainedModel):
                avoid_emulation(function)
            if isinstance(function, nn.Module):
                rewards.append(RewardModel(function, tokenizer, self.eos_token_ids, self.chat_template_kwargs, name))
            else:
                rewards.append(guard_reward(function, name))
        self.reward_funcs: list[Any] = rewards
        paying = [reward for reward, weight in zip(rewards, self.reward_weights.tolist(), strict=True) if weight]
        self.add_callback(CollapseAlarms(checked=not any(isinstance(reward, RewardModel) for reward in paying)))
        # Sharded weights (FSDP, DeepSpeed) are whole only in TRL's methods; prompt learning prepends its own tokens.
        prompted = isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning
        self._whole_and_bare = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or prompted)
        # On a CPU, sampling takes a third longer with an unmerged adapter. Only plain LoRA is merged in place, and not
        # into the embeddings or the output layer: if these are tied, merging into one would change the other.
        self._merges = self._whole_and_bare and isinstance(self.model, PeftModel) and self.args.device.type == "cpu"
        if self._merges:
            lora, body = self.model.active_peft_config, self.model.get_base_model()
            own = not isinstance(lora, LoraConfig) or lora.use_dora or lora.lora_bias or lora.alora_invocation_tokens
            own = own or getattr(body, "is_quantized", False)
            ends = body.get_input_embeddings(), body.get_output_embeddings()
            self._merges = not (own or any(isinstance(layer, BaseTunerLayer) for layer in ends))
        if self.use_vllm:
            # vLLM in this process uses the global random state, which it seeds at startup, but only with the rank.
            set_seed(args.seed + self.accelerator.process_index // args.vllm_tensor_parallel_size)
            logger.info("%-11s vLLM (%s); a resumed run is not exact to the bit", "sampling", args.vllm_mode)

    # ---- The rollout

    def get_train_dataloader(self) -> Any:
        """Leave rows where they are: accelerate would look for tensors to move in every number of every column."""
        placed = self.accelerator.device_placement
        # This setting would also change how a stream is split.
        self.accelerator.device_placement = placed and isinstance(self.train_dataset, IterableDataset)
        loader = super().get_train_dataloader()
        self.accelerator.device_placement = placed
        return loader

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return EpochSampler(super()._get_train_sampler(dataset), lambda: self.state.epoch)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Sample a completion of each prompt, without dropout. Return their token ids, and None for their logps."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # Mamba, for instance, does not take positions.
        plain = self._whole_and_bare and accepts_argument(model, "position_ids") and not overrides_generate(model)
        plain = plain and not (self.use_vllm or self.use_transformers_continuous_batching or self._is_vlm)
        if plain:
            # The trainer's settings take precedence over the model's, as in `model.generate`.
            config = copy.deepcopy(self.generation_config)
            config.update(**model.generation_config.to_dict(), defaults_only=True)
            plain = not unsupported_settings(config)
        merges = plain and self._merges
        # Trained modules are in float32, frozen ones may be in bf16. One context for all tokens casts weights once.
        with unrounded(self.model, merge=True) if merges else nullcontext(), self.accelerator.autocast():
            if not plain:
                is_merged = self.use_vllm and isinstance(self.model, PeftModel) and self._whole_and_bare
                is_loaded = is_merged and self.state.global_step != self._last_loaded_step
                with unrounded(self.model) if is_loaded else nullcontext():
                    return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            training = model.training
            lengths = [len(prompt) + config.max_new_tokens for prompt in prompt_ids]
            sampled: dict[int, list[int]] = {}
            with profiling_context(self, "sample"):
                for batch in map(sorted, batches(lengths, model.device)):
                    sampled |= zip(batch, sample(model.eval(), [prompt_ids[i] for i in batch], config), strict=True)
            model.train(training)
            return [ids for _, ids in sorted(sampled.items())], None

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Answer the calls of the first turns, and sample what follows, with the same loop as evaluation."""
        if self._is_vlm or any(map(is_async_callable, self.tools)):
            for tools in self._sync_tool_dicts:
                tools |= {name: partial(call_tool, tool) for name, tool in tools.items()}
            return super()._tool_call_loop(*args, **kwargs)
        _, prompt_ids, completion_ids, completions, logprobs, *_ = args
        dialogues = [Dialogue(*of_each) for of_each in zip(prompt_ids, self._sync_tool_dicts, strict=True)]
        for number, dialogue in enumerate(dialogues):
            first = None if logprobs is None else logprobs[number]
            dialogue.logps = None if first is None else []
            dialogue.add_turn(list(completion_ids[number]), first, completions[number][0])
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        if self.use_vllm and self.vllm_mode == "colocate":
            # vLLM may have memory for fewer tokens than the model has positions.
            context = self.vllm_generation.llm.llm_engine.model_config.max_model_len
        # With sharded weights or vLLM, all processes sample together, so none may sample more turns than another.
        at_once = self.use_vllm or not self._whole_and_bare
        reduce, device = self.accelerator.reduce, self.accelerator.device
        converse(
            dialogues,
            self._sample_turn,
            self._tokenizer,
            ends=self.eos_token_ids,
            limit=self.max_completion_length,
            context=context,
            turns=self.max_tool_calling_iterations,
            template={**self.chat_template_kwargs, "chat_template": self.chat_template},
            goes_on=lambda own: bool(reduce(torch.tensor(int(own), device=device)) if at_once else own),
        )
        turns = sum(message["role"] == "assistant" for dialogue in dialogues for message in dialogue.messages)
        sampled = sum(sum(dialogue.sampled) for dialogue in dialogues)
        sampled, turns = reduce(torch.tensor([sampled, turns], device=device), reduction="sum").tolist()
        self._metrics["train" if self.model.training else "eval"]["tools/turn_length"].append(sampled / max(turns, 1))
        texts = [[getattr(dialogue, name) for dialogue in dialogues] for name in ("sampled", "messages", "tokens")]
        logps = None if logprobs is None else [dialogue.logps for dialogue in dialogues]
        counts = [sum(getattr(dialogue, name) for dialogue in dialogues) for name in ("calls", "failures")]
        return *texts, logps, *counts, [[] for _ in dialogues]

    def _sample_turn(self, texts: Sequence[list[int]], room: int) -> Any:
        """Sample a turn of at most `room` tokens after each text. vLLM applies its own limit."""
        config = self.generation_config
        config.max_new_tokens = room
        try:
            # A process whose dialogues have ended may still have to take part.
            sampled = self._generate_single_turn(list(texts) or [self.eos_token_ids[:1]], None, {}, num_generations=1)
            return [part and part[: len(texts)] for part in sampled]
        finally:
            config.max_new_tokens = self.max_completion_length

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
        """Return log-probabilities (B, `logits_to_keep`), entropies in nats if requested, and an auxiliary loss.

        On a CPU, only compute logits for the completion, without TRL's tiles, which take several times as long.
        Positions are counted from each text's first token, as during sampling. TRL also counts padding, which changes
        the output of models with learned positions.

        Gradients flow through both results if they are enabled, so that a subclass can add an entropy to its loss. The
        exception are the entropies that TRL's own loss logs, unless `entropy_coef` makes them a part of it: without
        gradients, they cost less.
        """
        plain = input_ids.device.type == "cpu" and self._whole_and_bare
        asked = any(value is not None and value is not False for value in others.values())
        if not plain or asked or not accepts_argument(model, "logits_to_keep"):
            positioned = model if self._is_vlm else with_positions(model)
            log_probs, entropies, more = super()._get_per_token_logps_and_entropies(
                positioned, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )
        else:
            more = None
            log_probs, entropies = token_log_probs(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                temperature=self.temperature,
                entropy=compute_entropy,
                entropy_gradient=not self._only_logs_entropy,
                autocast=self.accelerator.autocast,
            )
        self.latest_logps = log_probs.detach()
        return log_probs, entropies, more

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Omit completions without an advantage, whose gradients are 0; each process keeps at least one completion.

        The entropy and the clipped shares that are logged are then those of the completions that are learned from.
        """
        advantages, args = inputs["advantages"], self.args
        others = (
            self._is_vlm
            or self.beta
            or self.aux_loss_enabled
            or self._entropy_bonus_enabled
            or self.top_entropy_quantile < 1
        )
        # These losses are divided by the number of tokens of the whole rollout.
        if self.model.training and advantages.dim() == 1 and args.loss_type in ("dapo", "cispo") and not others:
            has_tokens = inputs["completion_mask"].any(1)
            learned = (advantages != 0) & has_tokens
            number = max(1, int(self.accelerator.gather(learned.sum()).max()))
            rows = (2 * learned.int() + has_tokens.int()).argsort(descending=True, stable=True)[:number]
            inputs = {name: x[rows] if isinstance(x, Tensor) and x.dim() else x for name, x in inputs.items()}
        self._only_logs_entropy = not self._entropy_bonus_enabled
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._only_logs_entropy = False

    # ---- Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate under a fixed random state, and restore training's state afterwards."""
        # How many completions each batch has.
        self._evaluated: list[int] = []
        with hardware.unchanged_rng():
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            output = super().evaluation_loop(*args, **kwargs)
        if self._evaluated:
            self._log_averages()
        prefix = kwargs.get("metric_key_prefix", "eval")
        for name, values in self._metrics["eval"].items():
            # A mean over the whole evaluation is one value, and reward functions that log metrics may skip batches.
            rows = self._evaluated if len(values) == len(self._evaluated) else [1] * len(values)
            known = [(value, count) for value, count in zip(values, rows, strict=True) if not math.isnan(value)]
            total = sum(count for _, count in known)
            mean = sum(value * count for value, count in known) / total if total else None
            output.metrics[f"{prefix}_{name}"] = mean
        # TRL would log them under the prefix "eval" for any data set.
        self._metrics["eval"].clear()
        return output

    def _log_averages(self) -> None:
        """Add metrics that are averages over several batches; GRPO has none."""

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return and keep the rewards of the completions of all processes, (completions, rewards).

        With weight 0, a reward is only measured: alone, it gives no score. A reward that fails stops the run.
        """
        try:
            rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        except UserError as error:
            # It may fail on a single process, and only the first process reports a `UserError`.
            step = self.state.global_step + 1
            raise RunStopped(f"{error}, and start again (in step {step}; {self.last_good()}).") from error
        rewards[rewards[:, self.reward_weights != 0].isnan().all(dim=1)] = torch.nan
        self.all_rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Sample and score as TRL does, and count the completions of an evaluation."""
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            scored = ~self.all_rewards.isnan().all(dim=1)
            totals = (self.all_rewards * self.reward_weights.to(scored.device)).nansum(dim=1)[scored]
            self._metrics["train"]["reward_max"].append(max(totals.tolist(), default=math.nan))
        else:
            rows = torch.tensor(len(batch["completion_ids"]), device=self.accelerator.device)
            self._evaluated.append(int(self.accelerator.reduce(rows, reduction="sum")))
        return batch
