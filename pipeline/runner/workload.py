"""Arithmetic for `fourstage plan`: the FLOPs, the memory and the seconds of the steps of a run. Nothing is trained.

`read_workload` derives the `Workload` of a step from its settings and from the `Outputs` of the steps before it.
`memory`, `advice` and `evaluation_seconds` compute with a workload.

A *sequence* is what a model reads at once: a block of packed texts, a text, or a prompt with its answer. A row of the
data holds one sequence or, if it is a pair of answers, two.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.evaluate_yaml import DEFAULT_LENGTH
from pipeline.files import as_list
from pipeline.runner.steps import Step
from pipeline.stages.kinds import StageKind

if TYPE_CHECKING:
    # Importing torch takes seconds, too long for `--help`.
    from pipeline.hardware import Processor

TEXT = 1 / 4
"""Mean length of a text, as a share of `max_length`."""
ANSWER = 1 / 3
"""Mean length of an answer, and of its prompt without the chat template, as a share of the longest answer."""
START = 3.0
"""Seconds in which a step loads libraries, model and data; with recipes/pocket on 2 cores of an AMD EPYC."""
TEXT_RATE = 4e6
"""Bytes of text per second for `recipes.data` and for training a tokenizer, measured on the same machine."""
LAYER = 1e-3
"""Seconds that a layer takes to sample the next token of all answers: transformers launches its kernels one by one."""
VLLM_LAYER = 1e-4
"""The same with vLLM."""
ROWS = 400
"""Rows of a data set that an evaluation answers."""
SAMPLED = 64
"""Problems to which an evaluation samples several answers."""
AT_ONCE = 256
"""Answers that an evaluation samples at once."""
DOCUMENT = 4e3
"""Bytes per document."""
LIBRARIES = 1.5e9
"""Bytes that a process takes in addition to its tensors."""
TILE = 2**27
"""Maximum number of logits that TRL's trainers keep at once."""


class Settings(SimpleNamespace):
    """The settings of a step as attributes, with the defaults of its recipe; any other attribute is None."""

    def __getattr__(self, name: str) -> Any:
        return None

    def build(self, kind: type) -> Any:
        """Return the dataclass `kind` with these settings."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Machine:
    """The machine that a run is planned for.

    Attributes:
        processes: Number of processes, each of which has a processor.
        sharded: Whether the launch file splits models over the processes.
        processor: Speed and memory of a process.
        mfu: Model FLOPs utilization: the share of the processor's peak that training reaches.
        price: Price of a processor for an hour; None if the user gave none.
    """

    processes: int
    sharded: bool
    processor: Processor
    mfu: float
    price: float | None

    def cost(self, hours: float) -> float | None:
        """Return the cost of a number of hours, or None without a price."""
        if self.price is None:
            return None
        return hours * self.processes * self.price


@dataclass
class Workload:
    """What a step that trains or samples computes with.

    Attributes:
        settings: The settings of the step.
        kind: Its entry in `STAGES`.
        model: The model that it starts from, on the meta device.
        processes: Number of processes.
        sharded: Whether the model is split over the processes.
        activation_bytes: Bytes of a number in an activation: 2 with mixed precision, otherwise 4.
        recompute: Whether activations are recomputed in the backward pass.
        sequences_per_row: 2 if a row is a pair of answers, otherwise 1.
        packing: Whether texts are packed into blocks.
        trained_parameters: Number of parameters that are trained, including the critic's.
        reward_models: Number of reward models that score the answers.
        has_reference: Whether the answers are also scored by a reference model, for a KL penalty.
        frozen_models: Number of models in memory that are not trained.
        dataset_rows: Number of rows of the training data; 0 if that is unknown and not needed.
        text_tokens: Mean tokens of a text or, if answers are sampled, of a prompt with its chat template.
        max_tokens: Maximum tokens of a sequence or, if answers are sampled, of an answer.
        mean_tokens: Mean tokens of a sequence.
        longest_tokens: Tokens of the longest sequence.
        sequences: Number of sequences in the whole step, over all processes. A sampled answer that is used for several
            updates counts once.
        passes: Passes over each token, of which a backward pass counts as two.
        answers_at_once: Number of answers that a process samples at once.
        flops: FLOPs of the whole step, over all processes.
    """

    settings: Settings
    kind: StageKind
    model: Any
    processes: int
    sharded: bool
    activation_bytes: int
    recompute: bool
    sequences_per_row: int
    packing: bool
    trained_parameters: int = 0
    reward_models: int = 0
    has_reference: bool = False
    frozen_models: int = 0
    dataset_rows: int = 0
    text_tokens: float = 0.0
    max_tokens: int = 0
    mean_tokens: float = 0.0
    longest_tokens: float = 0.0
    sequences: float = 0.0
    passes: float = 0.0
    answers_at_once: int = 0
    flops: float = 0.0


def _add_lengths(work: Workload) -> None:
    """Set the mean and the maximum length of a sequence in a workload that has those of a text or answer."""
    if work.kind.samples:
        work.mean_tokens = work.text_tokens + ANSWER * work.max_tokens
        work.longest_tokens = work.text_tokens + work.max_tokens
        return
    work.longest_tokens = work.max_tokens
    work.mean_tokens = min(work.text_tokens, work.max_tokens)
    if work.packing:
        # Blocks are full.
        work.mean_tokens = work.max_tokens


def _add_sampling(work: Workload) -> None:
    """Set the `sequences`, `passes` and `answers_at_once` of a step that only samples (`recipes.preferences`)."""
    settings = work.settings
    # Answers to held-out prompts are sampled as well, for the validation and the test split of the pairs.
    test_prompts = settings.max_eval_prompts or 0
    validation_prompts = settings.max_validation_prompts or test_prompts
    prompts = (settings.max_prompts or work.dataset_rows) + test_prompts + validation_prompts
    work.sequences = prompts * settings.samples_per_prompt
    work.passes = 1
    work.answers_at_once = settings.batch_size


def _add_training(work: Workload) -> None:
    """Set the `sequences`, `passes` and `answers_at_once` of a stage that trains."""
    settings = work.settings
    kind = work.kind
    # Number of updates that each sampled answer is used for; 1 if none are sampled.
    uses = settings.num_iterations or 1
    rows_per_update = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * work.processes
    updates = settings.max_steps
    if updates <= 0:
        updates = math.ceil(math.ceil(_rows_per_epoch(work, uses) / rows_per_update) * settings.num_train_epochs)
    work.sequences = updates * rows_per_update * work.sequences_per_row / uses

    # Batches of a device, for which answers are sampled at once.
    batches_per_rollout = settings.steps_per_generation or settings.gradient_accumulation_steps
    if kind.samples and settings.generation_batch_size:
        work.answers_at_once = settings.generation_batch_size // work.processes
    elif kind.samples:
        work.answers_at_once = settings.per_device_train_batch_size * batches_per_rollout

    # A forward pass, a backward pass (which counts two) and, if activations are recomputed, another forward pass.
    training = 3
    if work.recompute:
        training += 1
    # Forward passes of other models, which only score what is trained on.
    scoring = work.reward_models + int(work.has_reference)
    if not kind.samples:
        work.passes = training + scoring
        if kind.data == "unpaired":
            # To estimate the KL divergence, both models also read each prompt with the answer to another prompt.
            work.passes += 2
    elif kind.has_critic:
        # Sampling, old log-probabilities and old values; then both the policy and the critic are trained.
        work.passes = 3 + scoring + 2 * uses * training
    else:
        sampling = 1
        work.passes = sampling + scoring + uses * training
        # If all updates with a rollout are in one optimizer step, training itself computes the old log-probabilities.
        if settings.gradient_accumulation_steps % (batches_per_rollout * uses) > 0:
            work.passes += 1


def _rows_per_epoch(work: Workload, uses: int) -> float:
    """Return the number of rows that are trained on in an epoch: blocks, answers for each of their uses, or rows."""
    if work.packing:
        return work.dataset_rows * work.text_tokens / work.max_tokens
    if work.kind.samples:
        return work.dataset_rows * (work.settings.num_generations or 1) * uses
    return work.dataset_rows


def _add_flops(work: Workload) -> None:
    """Set the FLOPs of a workload that has everything else."""
    from pipeline.models.experts import training_flops_per_token

    config = work.model.config.get_text_config()
    training_flops = training_flops_per_token(work.model, round(work.mean_tokens))
    if not work.kind.generates:
        # A reward model scores a text, and computes no logits.
        training_flops -= 6 * config.vocab_size * config.hidden_size
    # Training is one forward and one backward pass, which count three.
    work.flops = work.sequences * work.mean_tokens * work.passes / 3 * training_flops


def evaluation_seconds(step: Step, work: Workload, machine: Machine) -> float:
    """Return the seconds of an evaluation, which answers instructions, prompts and problems.

    Args:
        step: The evaluation. Its setting `samples` says how many more answers to some of the problems it samples.
        work: The workload of the step that writes the evaluated model.
        machine: The machine that the run is planned for.
    """
    if not work.kind.generates:
        # A reward model only scores pairs.
        return START
    settings = Settings(**step.values)
    model = work.model
    rows = settings.limit or ROWS
    # Instructions, prompts and problems, and several answers to some of the problems.
    answers = 3 * rows + min(rows, SAMPLED) * (settings.samples or 0)
    positions = settings.max_new_tokens or DEFAULT_LENGTH
    seconds_per_layer = LAYER
    if settings.vllm:
        seconds_per_layer = VLLM_LAYER
    seconds_per_position = seconds_per_layer * model.config.get_text_config().num_hidden_layers
    # A prompt and an answer, each of them ANSWER of the longest answer, at 2 FLOPs for each parameter and token.
    tokens = answers * 2 * ANSWER * positions
    peak = machine.processor.half or machine.processor.single
    computing = tokens * 2 * model.num_parameters() / (machine.mfu * peak)
    batches = math.ceil(answers / AT_ONCE)
    return START + batches * positions * seconds_per_position + computing


def memory(work: Workload) -> dict[str, float]:
    """Return the bytes of one process, by part."""
    config = work.model.config.get_text_config()
    parameters = work.model.num_parameters()
    layers = config.num_hidden_layers
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Width of the keys of one layer, which is that of its values.
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    # Tokens of a batch.
    read = (work.settings.per_device_train_batch_size or 0) * work.sequences_per_row * work.longest_tokens
    shares = work.processes if work.sharded else 1
    trained = work.trained_parameters / shares

    weights = 4 * trained
    if work.activation_bytes == 2:
        # A copy in 16 bits; sharded weights are gathered and copied layer by layer.
        weights += 2 * parameters / (layers if work.sharded else 1)
    gradients = 4 * trained
    if work.processes > 1 and not work.sharded:
        # DDP has buckets for as many.
        gradients = 8 * trained
    layer = _layer_bytes(config, head * config.num_attention_heads, keys, work.activation_bytes)
    activations = layers * layer
    if work.recompute:
        # Only the inputs of all layers are kept, plus everything of one layer at a time.
        activations = layers * 4 * config.hidden_size + layer
    logits = 0.0
    if work.kind.generates:
        # Pretraining has all logits at once, TRL's trainers have a tile of them, and a reward model only has scores.
        most = math.inf if work.kind.from_scratch else TILE
        logits = min(most, read * config.vocab_size)
    frozen_size = 4
    keeps_float32 = work.sharded or work.settings.frozen_dtype == "float32"
    if work.settings.use_peft and work.activation_bytes == 2 and not keeps_float32:
        # The weights that are frozen under an adapter are converted, unless they are sharded.
        frozen_size = 2
    frozen = work.frozen_models * parameters * frozen_size / shares
    if work.settings.load_in_4bit:
        # Reward models keep their precision; policy, reference and critic share one base.
        frozen = work.reward_models * parameters * frozen_size + _quantized_bytes(work.model, frozen_size)
        # The layers are read one at a time.
        weights = 4 * trained
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 8 * trained,
        "activations": read * activations,
        # Logits and their gradient and, in float32, a copy, its log-softmax and a gradient.
        "logits": logits * (2 * work.activation_bytes + 3 * 4),
        "rollouts": work.answers_at_once * work.longest_tokens * 2 * keys * layers * work.activation_bytes,
        "frozen": frozen,
        "other": LIBRARIES,
    }


def _quantized_bytes(model: Any, size: int) -> float:
    """Return the bytes of a model's weights with `load_in_4bit`; embeddings, norms and head keep `size` bytes each.

    bitsandbytes stores 4 bits for a weight, and a scale of 32 bits for each 64 of them.
    """
    from torch import nn

    head = model.get_output_embeddings()
    quantized = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            quantized += module.weight.numel()
    return quantized * (4 + 32 / 64) / 8 + (model.num_parameters() - quantized) * size


def _layer_bytes(config: Any, queries: int, keys: int, size: int) -> int:
    """Return the bytes that a layer keeps for each token until the backward pass.

    These are its two norms' inputs in float32, raw and normalised, and outputs; queries, keys, values and the output of
    attention (but no scores); and four times its feed-forward width.

    Args:
        config: The model's configuration.
        queries: Width of the queries of all heads.
        keys: Width of the keys of all heads.
        size: Bytes of an activation.
    """
    hidden: int = config.hidden_size
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    width *= 1 + (getattr(config, "num_local_experts", None) or 0)
    return 2 * 2 * 4 * hidden + size * (2 * hidden + 2 * queries + 2 * keys + 4 * width)


def advice(work: Workload, room: float) -> str:
    """Suggest the smallest change of settings or machines with which a stage fits into `room` bytes, as a phrase."""
    batch = work.settings.per_device_train_batch_size or 0
    divisors = [size for size in range(batch, 0, -1) if batch % size == 0]
    # Smaller batches take less time than recomputing activations, so they are tried first.
    for recompute in (work.recompute, True):
        for size in divisors:
            settings = Settings(**vars(work.settings))
            settings.per_device_train_batch_size = size
            smaller = replace(work, recompute=recompute, settings=settings)
            if sum(memory(smaller).values()) > room:
                continue
            changes: list[str] = []
            if recompute and not work.recompute:
                changes.append("--activation_checkpointing true")
            if size < batch:
                times = batch // size
                changes.append(f"--per_device_train_batch_size {size} and {times} times the gradient accumulation")
            return ", ".join(changes)
    remedies = "LoRA (use_peft: true), more or larger GPUs"
    # PPO does not support sharded models.
    if work.kind.has_critic:
        return remedies
    return f"{remedies}, or recipes/accelerate/fsdp2.yaml or zero3.yaml"


@dataclass
class Outputs:
    """What the steps so far write. All keys are the `output_dir` of a step.

    Attributes:
        models: Each model, on the meta device.
        template_tokens: Number of tokens that a model's chat template adds to a prompt; 0 if it is not known.
        vocabulary_sizes: Size of each tokenizer's vocabulary.
        rows: Number of rows of each data set.
        mean_tokens: Mean number of tokens of a sequence in each data set.
    """

    models: dict[str, Any] = field(default_factory=dict)
    template_tokens: dict[str, int] = field(default_factory=dict)
    vocabulary_sizes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    mean_tokens: dict[str, float] = field(default_factory=dict)


def read_workload(step: Step, outputs: Outputs, machine: Machine) -> Workload | None:
    """Return the workload of a step, or None if it neither trains nor samples.

    Args:
        step: The step.
        outputs: What the earlier steps write, to which this function adds what this step writes.
        machine: The machine that the run is planned for.

    Raises:
        UserError: If the model cannot be loaded, or the number of rows is needed and unknown.
    """
    settings = read_settings(step)
    # Later steps need the size of the vocabulary, and the number of people's votes.
    if step.kind == "tokenizer":
        outputs.vocabulary_sizes[settings.output_dir] = settings.vocab_size
    if step.kind == "votes":
        outputs.rows[settings.output_dir] = settings.min_votes
    kind = step.stage
    if not kind.launched:
        return None

    model, template_tokens = _read_model(kind, settings, outputs)
    recompute = settings.activation_checkpointing
    if recompute is None:
        recompute = settings.gradient_checkpointing
    has_half = machine.processor.half and (step.values.get("bf16") is not False or settings.fp16)
    work = Workload(
        settings=settings,
        kind=kind,
        model=model,
        processes=machine.processes,
        sharded=machine.sharded and not kind.has_critic,
        activation_bytes=2 if has_half else 4,
        recompute=bool(recompute),
        sequences_per_row=2 if kind.data == "preference" else 1,
        packing=bool(kind.from_scratch or settings.packing),
    )
    _add_data(work, template_tokens, outputs)
    _add_lengths(work)
    _add_models(work)
    if kind.measured:
        _add_training(work)
    else:
        _add_sampling(work)
    _add_flops(work)

    if kind.measured:
        outputs.models[settings.output_dir] = model
    else:
        outputs.rows[settings.output_dir] = (settings.max_prompts or work.dataset_rows) * settings.pairs_per_prompt
    outputs.mean_tokens[settings.output_dir] = work.mean_tokens
    outputs.template_tokens[settings.output_dir] = template_tokens
    return work


def read_settings(step: Step) -> Settings:
    """Return the settings of a step, with the defaults of its recipe; importing the recipe may take seconds."""
    defaults: dict[str, Any] = {}
    for arguments in step.argument_types:
        for item in dataclasses.fields(arguments):
            if item.default is not dataclasses.MISSING:
                defaults[item.name] = item.default
    return Settings(**{**defaults, **step.values})


def _read_model(kind: StageKind, settings: Settings, outputs: Outputs) -> tuple[Any, int]:
    """Return the model that a stage starts from, on the meta device, and the number of tokens of its chat template.

    That number is 0 for a model from scratch, and for one without a chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.models.loading import load_config, load_tokenizer, user_error_for
    from pipeline.models.scratch import ScratchArguments, build_empty

    if kind.from_scratch:
        name = settings.tokenizer_name_or_path
        vocabulary_size = outputs.vocabulary_sizes.get(name) or len(load_tokenizer(name, "tokenizer_name_or_path"))
        return build_empty(settings.build(ScratchArguments), vocabulary_size), 0
    name = settings.model_name_or_path
    if name in outputs.models:
        return outputs.models[name], outputs.template_tokens[name]
    with user_error_for("model_name_or_path", name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name, settings.model_revision), trust_remote_code=False)
    tokenizer = load_tokenizer(settings.tokenizer_name_or_path or name, "model_name_or_path")
    if not tokenizer.chat_template:
        return model, 0
    # The template counts, because a system prompt may be longer than the question.
    empty = [{"role": "user", "content": ""}]
    prompt = tokenizer.apply_chat_template(empty, add_generation_prompt=True, return_dict=False)
    return model, len(prompt)


def _add_data(work: Workload, template_tokens: int, outputs: Outputs) -> None:
    """Set the number of rows of the training data, and the mean and maximum tokens of their texts or answers.

    Args:
        work: The workload.
        template_tokens: Number of tokens that the model's chat template adds to each prompt.
        outputs: What the earlier steps write.
    """
    from pipeline.data.arguments import DataArguments
    from pipeline.data.splits import count_rows

    settings = work.settings
    content: Any = work.kind.data
    depends_on_rows = not settings.max_prompts and (settings.max_steps or 0) <= 0
    data = settings.build(DataArguments)
    work.dataset_rows, measured_tokens = count_rows(data, content, outputs.rows, depends_on_rows)
    # The first of these that the recipe has and the user has not emptied; without any, the model sets the limit.
    for limit in ("block_size", "max_length", "max_completion_length", "max_new_tokens"):
        work.max_tokens = work.max_tokens or getattr(settings, limit) or 0
    work.max_tokens = work.max_tokens or work.model.config.get_text_config().max_position_embeddings

    share = ANSWER if work.kind.samples else TEXT
    planned_tokens = outputs.mean_tokens.get(str(settings.dataset_name))
    work.text_tokens = measured_tokens or planned_tokens or work.max_tokens * share
    if work.kind.samples:
        work.text_tokens += template_tokens


def _add_models(work: Workload) -> None:
    """Set the number of trained parameters, and how many reward, reference and other frozen models are in memory."""
    from trl import ModelConfig

    from pipeline.models.adapters import count_trainable

    settings = work.settings
    if work.kind.measured:
        work.trained_parameters = count_trainable(work.model, settings.build(ModelConfig))
    if settings.reward_model_path:
        work.reward_models = len(as_list(settings.reward_model_path))
    kl_weight = settings.kl_coef if work.kind.has_critic else settings.beta
    work.has_reference = (kl_weight or 0) > 0

    has_critic_adapter = bool(settings.use_peft and settings.value_use_peft)
    work.frozen_models = work.reward_models
    if settings.use_peft or not work.trained_parameters:
        # The model itself is frozen, under an adapter or because it only samples. Without its adapter, it is also the
        # reference.
        work.frozen_models += 1
        if has_critic_adapter:
            work.frozen_models += 1
    elif work.has_reference:
        work.frozen_models += 1

    if work.kind.has_critic and settings.use_peft and not has_critic_adapter:
        # The adapter of the policy, and a whole critic.
        work.trained_parameters += work.model.num_parameters()
    elif work.kind.has_critic:
        work.trained_parameters *= 2
