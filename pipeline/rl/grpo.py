"""TRL's `GRPOTrainer`: exact resumption, evaluation without side effects, faster sampling and log-probabilities."""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from transformers import GenerationConfig, PreTrainedModel, set_seed
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
from pipeline.training.frozen_weights import compute_in_float32, frozen_copy, restore_frozen_weights
from pipeline.training.reliable import Reliable

logger = get_logger(__name__)


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """TRL's `RepeatSampler`, with an order of the rows that depends only on the seed and the number of the epoch.

    TRL draws all orders from one generator, so a run resumed in the second epoch would repeat the first order.

    Args:
        sampler: A `RepeatSampler` of TRL, whose generator is seeded again for each epoch.
        epoch: Returns the epoch so far, with a fraction such as 1.5; None before training begins.
    """

    sampler: Any
    epoch: Callable[[], float | None]

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + int(self.epoch() or 0))
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


@contextmanager
def _beta_for_constructor(args: GRPOConfig, beta: float) -> Iterator[None]:
    """Set `args.beta` while TRL's constructor runs, which makes a reference unless it is 0. Restore `args` afterwards.

    TRL knows `beta` as the weight of the KL in GRPO's loss. PPO's loss has no KL, and its reference is for the rewards.
    """
    beta_of_loss = args.beta
    sync_ref_model = args.sync_ref_model
    args.beta = beta
    if beta == 0 and beta_of_loss != 0:
        # TRL's callback would have nothing to update.
        args.sync_ref_model = False
    try:
        yield
    finally:
        args.beta = beta_of_loss
        args.sync_ref_model = sync_ref_model


def _can_merge(model: nn.Module) -> bool:
    """Return whether a model is an adapter that can be merged into its base in place, and removed again.

    This holds for plain LoRA that does not adapt the embeddings or the output layer. If these are tied, merging into
    one would change the other.
    """
    if not isinstance(model, PeftModel):
        return False
    lora = model.active_peft_config
    base = model.get_base_model()
    if not isinstance(lora, LoraConfig) or lora.use_dora or lora.lora_bias or lora.alora_invocation_tokens:
        return False
    if getattr(base, "is_quantized", False):
        return False
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    return not any(isinstance(layer, BaseTunerLayer) for layer in embeddings)


class GRPOTrainer(Reliable, TRLGRPOTrainer):
    """TRL's `GRPOTrainer`, but exactly resumable wherever it stopped.

    TRL samples again after it has resumed, although a rollout may serve several steps (`steps_per_generation` above
    `gradient_accumulation_steps`, or `num_iterations` above 1). Here, a checkpoint contains the rest of the rollout, a
    file for each process. With another number of processes or batch size, a rollout cannot be used, and is sampled
    again. With vLLM, whose probabilities depend on the rest of the batch, a resumed run samples different completions.

    Evaluation, which also samples, uses its own random numbers. `evaluate` returns its metrics under the prefix of
    their data set. Every completion counts equally, even in an incomplete last batch.

    Completions are sampled by `pipeline.models.kernels.sampler`, or by TRL where that cannot
    (`_generate_single_turn`). A reward with weight 0 is measured and logged without any other effect.

    Guarded by `tests/rl/test_grpo.py`, `tests/rl/test_ppo_resume.py` and `tests/recipes/test_sampling_recipes.py`
    (exact resume), `tests/rl/test_tools.py` (dialogues) and `tests/rl/test_positions.py` (log-probabilities).

    Args:
        model: The policy: a path, a Hub id, or a model. With `beta`, its present state is the reference.
        reward_funcs: Reward models or functions, as for TRL's trainer.
        args: The configuration. Default: `GRPOConfig()`.
        *arguments, **kwargs: Any other argument of TRL's trainer.

    Attributes:
        all_rewards: The latest rewards of the completions of all processes, (completions, rewards), NaN for None.
        latest_logps: The last log-probabilities, (B, T), which TRL's loss does not return.
        latest_entropies: The last entropies, (B, T), in nats. They have gradients if `learns_from_entropy` is set.
        learns_from_entropy: Whether the loss of a subclass contains `latest_entropies`.
    """

    learns_from_entropy = False
    # Whether the entropies that are computed at the moment are logged, and no part of a loss.
    _only_logs_entropy = False

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, *arguments: Any, **kwargs: Any
    ) -> None:
        args = args or GRPOConfig()
        launch.use_one_gpu(args)
        if isinstance(model, str):
            args.model_init_kwargs = {"device_map": None} | (args.model_init_kwargs or {})
        if args.use_vllm and args.vllm_max_model_length is None:
            args.vllm_max_model_length = LENGTH_THAT_FITS
        # What the KL is measured from, by what the policy is given as:
        #
        #   a name                         what TRL loads by this name once more
        #   a model in memory              a copy of it, because it may differ from what its name loads
        #   a model and `peft_config`      the model without its new adapter
        #   a `PeftModel`                  the copy of its adapter, named "ref", that TRL makes
        kl_weight = self.kl_weight(args)
        copies_reference = kl_weight != 0 and isinstance(model, PreTrainedModel) and not kwargs.get("peft_config")
        with _beta_for_constructor(args, 0.0 if copies_reference else kl_weight):
            super().__init__(model, reward_funcs, args, *arguments, **kwargs)
        self.beta = args.beta
        self.parts.append(Rollout(self))
        if args.cast_lm_head_to_fp32:
            for network in (self.model, self.ref_model):
                if network is not None:
                    compute_in_float32(extract_model_from_parallel(network).get_output_embeddings())
        if copies_reference:
            self._copy_reference()
        self._prepare_rewards()
        # Whether the methods below may call the model themselves. Sharded weights (FSDP, DeepSpeed) are whole only
        # within TRL's methods, and prompt learning prepends its own tokens.
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        learns_prompt = isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning
        self._is_plain = not (is_sharded or learns_prompt)
        # On a CPU, sampling takes a third longer with an unmerged adapter.
        self._merges = self._is_plain and self.args.device.type == "cpu" and _can_merge(self.model)
        if self.use_vllm:
            # vLLM in this process uses the global random state, which it seeds at startup, but only with the rank.
            set_seed(args.seed + self.accelerator.process_index // args.vllm_tensor_parallel_size)
            logger.info("%-11s vLLM (%s); a resumed run is not exact to the bit", "sampling", args.vllm_mode)

    def kl_weight(self, args: Any) -> float:
        """Return the weight of the KL to the reference, for which the constructor makes one; 0 for no reference."""
        return args.beta

    def _copy_reference(self) -> None:
        """Make a frozen copy of the policy the reference, and keep it up to date if `sync_ref_model` asks for it."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed do not shard the reference of a model in memory")
        reference = frozen_copy(self.model, self.temperature, self.args.cast_lm_head_to_fp32)
        self.ref_model: Any = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))

    def _prepare_rewards(self) -> None:
        """Make functions of reward models, guard other functions, and let alarms watch the rewards for a collapse."""
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
        # Rewards with weight 0 are only measured.
        weighted = [reward for reward, weight in zip(rewards, self.reward_weights.tolist(), strict=True) if weight]
        has_model = any(isinstance(reward, RewardModel) for reward in weighted)
        self.add_callback(CollapseAlarms(checked=not has_model))

    # ---- The rollout

    def get_train_dataloader(self) -> Any:
        """Leave rows where they are: accelerate would look for tensors to move in every number of every column."""
        if isinstance(self.train_dataset, IterableDataset):
            # The setting would also change how a stream is split.
            return super().get_train_dataloader()
        device_placement = self.accelerator.device_placement
        self.accelerator.device_placement = False
        loader = super().get_train_dataloader()
        self.accelerator.device_placement = device_placement
        return loader

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        """Return TRL's sampler, with an order that a resumed run repeats."""
        return EpochSampler(super()._get_train_sampler(dataset), lambda: self.state.epoch)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Sample a completion of each prompt, without dropout.

        Random numbers come from the global generator, which checkpoints contain: see the tests of exact resume.

        Args:
            prompt_ids: The token ids of each prompt.
            *args, **kwargs: What else TRL passes to this method.

        Returns:
            The token ids of each completion, and their log-probabilities if vLLM sampled them, otherwise None.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        config = self._sampling_config(model)
        if config is None:
            # Once in each step, TRL merges an adapter to pass the policy's weights on to vLLM.
            uses_adapter = self.use_vllm and isinstance(self.model, PeftModel) and self._is_plain
            will_merge = uses_adapter and self.state.global_step != self._last_loaded_step
            with self.accelerator.autocast(), restore_frozen_weights(self.model) if will_merge else nullcontext():
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)

        # Prompts are grouped into batches that fit into memory, by the maximum length of prompt and completion.
        lengths = [len(prompt) + config.max_new_tokens for prompt in prompt_ids]
        completions: dict[int, list[int]] = {}
        training = model.training
        model.eval()
        # Trained modules are in float32, frozen ones may be in bf16. A single autocast context casts the weights once
        # for all tokens.
        with (
            restore_frozen_weights(self.model, merge=True) if self._merges else nullcontext(),
            self.accelerator.autocast(),
            profiling_context(self, "sample"),
        ):
            for batch in batches(lengths, model.device):
                rows = sorted(batch)
                sampled = sample(model, [prompt_ids[row] for row in rows], config)
                completions |= zip(rows, sampled, strict=True)
        model.train(training)
        return [completions[row] for row in range(len(prompt_ids))], None

    def _sampling_config(self, model: Any) -> GenerationConfig | None:
        """Return the settings for `pipeline.models.kernels.sampler`, or None to let TRL sample.

        TRL samples with vLLM, continuous batching, sharded weights, images, a model without an argument for positions
        (such as Mamba), and settings that only `model.generate` has.
        """
        if self.use_vllm or self.use_transformers_continuous_batching or self._is_vlm or not self._is_plain:
            return None
        if not accepts_argument(model, "position_ids") or overrides_generate(model):
            return None
        # The trainer's settings take precedence over the model's, as in `model.generate`.
        config = copy.deepcopy(self.generation_config)
        config.update(**model.generation_config.to_dict(), defaults_only=True)
        if unsupported_settings(config):
            return None
        return config

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Answer the calls of the first turns, and sample what follows, with the same loop as evaluation.

        Returns:
            What TRL's method returns. For each completion: a list with 1 for each token that was sampled and 0 for each
            that a tool wrote, its messages, its token ids, and their log-probabilities (None for all completions if
            unknown). Then the number of calls, the number of failed calls, and the images of each completion, of which
            there are none.
        """
        if self._is_vlm or any(map(is_async_callable, self.tools)):
            for tools in self._sync_tool_dicts:
                for name, tool in tools.items():
                    tools[name] = partial(call_tool, tool)
            return super()._tool_call_loop(*args, **kwargs)
        _, prompt_ids, completion_ids, completions, logps, *_ = args
        dialogues = []
        for number, (prompt, tools) in enumerate(zip(prompt_ids, self._sync_tool_dicts, strict=True)):
            dialogue = Dialogue(prompt, tools)
            first_logps = None
            if logps is not None:
                first_logps = logps[number]
                dialogue.logps = []
            dialogue.add_turn(list(completion_ids[number]), first_logps, completions[number][0])
            dialogues.append(dialogue)
        # With sharded weights or vLLM, all processes sample together, so none may sample more turns than another.
        sample_together = self.use_vllm or not self._is_plain
        reduce = self.accelerator.reduce
        device = self.accelerator.device

        def any_continues(continues: bool) -> bool:
            """Return whether to sample another turn, if `continues` says that this process has a dialogue for it."""
            if not sample_together:
                return continues
            return bool(reduce(torch.tensor(int(continues), device=device)))

        converse(
            dialogues,
            self._sample_turn,
            self._tokenizer,
            ends=self.eos_token_ids,
            limit=self.max_completion_length,
            context=self._context_length(),
            turns=self.max_tool_calling_iterations,
            template={**self.chat_template_kwargs, "chat_template": self.chat_template},
            goes_on=any_continues,
        )
        turns = 0
        tokens = 0
        for dialogue in dialogues:
            turns += sum(message["role"] == "assistant" for message in dialogue.messages)
            tokens += sum(dialogue.sampled)
        tokens, turns = reduce(torch.tensor([tokens, turns], device=device), reduction="sum").tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["tools/turn_length"].append(tokens / max(turns, 1))
        logps_of_dialogues = None
        if logps is not None:
            logps_of_dialogues = [dialogue.logps for dialogue in dialogues]
        return (
            [dialogue.sampled for dialogue in dialogues],
            [dialogue.messages for dialogue in dialogues],
            [dialogue.tokens for dialogue in dialogues],
            logps_of_dialogues,
            sum(dialogue.calls for dialogue in dialogues),
            sum(dialogue.failures for dialogue in dialogues),
            [[] for _ in dialogues],
        )

    def _context_length(self) -> int:
        """Return how many tokens a dialogue may have, prompt included."""
        if self.use_vllm and self.vllm_mode == "colocate":
            # vLLM may have memory for fewer tokens than the model has positions.
            return self.vllm_generation.llm.llm_engine.model_config.max_model_len
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def _sample_turn(self, texts: Sequence[list[int]], max_tokens: int) -> Any:
        """Sample a turn of at most `max_tokens` tokens after each text, as token ids. vLLM applies its own limit.

        Return the ids of each turn, and their log-probabilities, or None if unknown.
        """
        config = self.generation_config
        config.max_new_tokens = max_tokens
        # A process whose dialogues have ended may still have to sample together with others.
        prompts = list(texts) or [self.eos_token_ids[:1]]
        try:
            ids, logps = self._generate_single_turn(prompts, None, {}, num_generations=1)
        finally:
            config.max_new_tokens = self.max_completion_length
        if logps is not None:
            logps = logps[: len(texts)]
        return ids[: len(texts)], logps

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log-probabilities (B, `logits_to_keep`), entropies in nats or None, and an auxiliary loss or None.

        On a CPU, only the logits of the completion are computed, without TRL's tiles, which take several times as long.
        Positions are counted from each text's first token, as during sampling. TRL also counts padding, which changes
        the output of models with learned positions.

        Gradients flow through both results if they are enabled. The exception are the entropies that TRL's own loss
        logs: without gradients, they cost less. They have gradients if they are a part of the loss, because of
        `entropy_coef` or of `learns_from_entropy`.
        """
        # TRL has options for images and for an auxiliary loss, which only its own method supports.
        has_options = any(value is not None and value is not False for value in options.values())
        is_on_cpu = input_ids.device.type == "cpu"
        auxiliary_loss = None
        if is_on_cpu and self._is_plain and not has_options and accepts_argument(model, "logits_to_keep"):
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
        else:
            positioned = model if self._is_vlm else with_positions(model)
            log_probs, entropies, auxiliary_loss = super()._get_per_token_logps_and_entropies(
                positioned, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **options
            )
        self.latest_logps = log_probs.detach()
        if entropies is not None:
            self.latest_entropies = entropies
        return log_probs, entropies, auxiliary_loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Compute TRL's loss without the completions whose advantage, and so whose gradient, is 0.

        Each process keeps at least one completion. The entropy and the clipped shares that are logged are then averages
        over the completions that the policy learns from.
        """
        advantages = inputs["advantages"]
        # With any of these, a completion with advantage 0 has a gradient as well.
        learns_from_all = (
            self._is_vlm
            or self.beta
            or self.aux_loss_enabled
            or self._entropy_bonus_enabled
            or self.learns_from_entropy
            or self.top_entropy_quantile < 1
        )
        # These losses are divided by the number of tokens of the whole rollout.
        is_per_token = self.args.loss_type in ("dapo", "cispo")
        if self.model.training and advantages.dim() == 1 and is_per_token and not learns_from_all:
            has_tokens = inputs["completion_mask"].any(1)
            is_learned = (advantages != 0) & has_tokens
            # All processes keep the same number of rows. One that learns from fewer adds others, first completions
            # that have tokens, so that no mean over tokens is empty.
            numbers = self.accelerator.gather(is_learned.sum())
            number = max(1, int(numbers.max()))
            # 3 for a completion that is learned from, 1 for another one with tokens, 0 for one without.
            priority = 2 * is_learned.int() + has_tokens.int()
            rows = priority.argsort(descending=True, stable=True)[:number]
            selected = {}
            for name, value in inputs.items():
                is_by_row = isinstance(value, Tensor) and value.dim() > 0
                selected[name] = value[rows] if is_by_row else value
            inputs = selected
        self._only_logs_entropy = not (self._entropy_bonus_enabled or self.learns_from_entropy)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._only_logs_entropy = False

    # ---- Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate under a fixed random state, and restore training's state afterwards."""
        # The number of completions of each batch, over all processes.
        self._eval_batch_sizes: list[int] = []
        with hardware.unchanged_rng():
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            output = super().evaluation_loop(*args, **kwargs)
        if self._eval_batch_sizes:
            self._log_averages()
        prefix = kwargs.get("metric_key_prefix", "eval")
        for name, values in self._metrics["eval"].items():
            # A metric with a value for each batch is weighted by the completions of the batch. Metrics of the whole
            # evaluation have a single value, and those that reward functions log may skip batches.
            weights = [1] * len(values)
            if len(values) == len(self._eval_batch_sizes):
                weights = self._eval_batch_sizes
            total = 0.0
            count = 0
            for value, weight in zip(values, weights, strict=True):
                if not math.isnan(value):
                    total += value * weight
                    count += weight
            output.metrics[f"{prefix}_{name}"] = total / count if count else None
        # TRL would log them under the prefix "eval" for any data set.
        self._metrics["eval"].clear()
        return output

    def _log_averages(self) -> None:
        """Add metrics that are averages over several batches. GRPO has none; `PPOTrainer` overrides this."""

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return and keep the rewards of the completions of all processes, (completions, rewards).

        A reward with weight 0 is only measured: where all others are None, it becomes NaN too, and there is no score. A
        reward that fails stops the run.
        """
        try:
            rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        except UserError as error:
            # It may fail on a single process, and only the first process reports a `UserError`.
            step = self.state.global_step + 1
            raise RunStopped(f"{error}, and start again (in step {step}; {self.last_good()}).") from error
        # To TRL, a completion that only has rewards of weight 0 would be one with the score 0.
        is_unscored = rewards[:, self.reward_weights != 0].isnan().all(dim=1)
        rewards[is_unscored] = torch.nan
        self.all_rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Sample and score as TRL does, and count the completions of an evaluation."""
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            # The alarms compare the mean reward with the highest one.
            is_scored = ~self.all_rewards.isnan().all(dim=1)
            totals = (self.all_rewards * self.reward_weights.to(is_scored.device)).nansum(dim=1)[is_scored]
            self._metrics["train"]["reward_max"].append(max(totals.tolist(), default=math.nan))
        else:
            rows = torch.tensor(len(batch["completion_ids"]), device=self.accelerator.device)
            self._eval_batch_sizes.append(int(self.accelerator.reduce(rows, reduction="sum")))
        return batch
