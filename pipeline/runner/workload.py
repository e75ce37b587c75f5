"""What the steps of a run take, by arithmetic: FLOPs, memory of a process, and seconds. Nothing is trained.

`read_workload` derives a step's `Workload` from its settings and from what the steps before it write.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.evaluate_yaml import DEFAULT_LENGTH
from pipeline.runner.steps import Step
from pipeline.stages.kinds import StageKind

if TYPE_CHECKING:
    # Importing torch takes seconds, too long for `--help`.
    from pipeline.hardware import Processor

TEXT = 1 / 4
"""Length of a text, as a share of `max_length`."""
ANSWER = 1 / 3
"""Length of an answer and of its prompt, as a share of the longest answer."""
START = 3.0
"""Seconds in which a step loads libraries, model and data; with recipes/pocket on 2 cores of an AMD EPYC."""
TEXT_RATE = 4e6
"""Bytes of text per second for `recipes.data` and for training a tokenizer, measured on the same machine."""
LAYER = 1e-3
"""Seconds per layer for one position of all answers: transformers launches its kernels one by one."""
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
"""Bytes of a process besides tensors."""
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
    """What a run is planned for.

    Attributes:
        processes: Number of processes, each of which has a processor.
        sharded: Whether the launch file splits models over the processes.
        processor: Speed and memory of a process.
        mfu: Share of the processor's peak that training reaches.
        price: Price of a processor for an hour, None if there is none.
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
        settings: Its settings.
        kind: Its entry in `STAGES`.
        model: The model that it starts from, on the meta device.
        processes: Number of processes.
        sharded: Whether the model is split over them.
        size: Bytes of an activation.
        recompute: Whether activations are recomputed in the backward pass.
        trained: Number of parameters that are trained, the critic's included.
        judges: Number of reward models.
        has_reference: Whether a reference model is read.
        frozen: Number of networks that are not trained.
        packing: Whether texts are packed into blocks.
        examples: Rows of the data set.
        texts: Texts in a row: 2 in a pair.
        text: Tokens of a text, or of a prompt if answers are sampled.
        cut: Tokens of the longest text or answer.
        average: Tokens of a row on average, with the answer.
        longest: Tokens of the longest row.
        rows: Blocks, texts, or prompts with answers in the whole step.
        passes: Passes over each token, of which a backward pass counts as two.
        at_once: Answers that a process samples at once.
        flops: FLOPs of all processes.
    """

    settings: Settings
    kind: StageKind
    model: Any
    processes: int
    sharded: bool
    size: int
    recompute: bool
    trained: int = 0
    judges: int = 0
    has_reference: bool = False
    frozen: int = 0
    packing: bool = False
    examples: int = 0
    texts: int = 1
    text: float = 0.0
    cut: int = 0
    average: float = 0.0
    longest: float = 0.0
    rows: float = 0.0
    passes: float = 0.0
    at_once: int = 0
    flops: float = 0.0


def count_work(work: Workload) -> None:
    """Add the lengths of rows, the number of rows, the passes over them and the FLOPs."""
    from pipeline.models.experts import training_flops_per_token

    settings = work.settings
    kind = work.kind
    if kind.samples:
        work.longest = work.text + work.cut
        work.average = work.text + ANSWER * work.cut
    else:
        work.longest = work.cut
        work.average = work.cut if work.packing else min(work.text, work.cut)
    if kind.measured:
        _count_training(work)
    else:
        # Answers are also sampled for validation and test, for people or annotators to choose from.
        held_out = settings.max_eval_prompts or 0
        prompts = (settings.max_prompts or work.examples) + held_out + (settings.max_validation_prompts or held_out)
        work.rows = prompts * settings.samples_per_prompt
        work.passes = 1
        work.at_once = settings.batch_size

    config = work.model.config.get_text_config()
    training_flops = training_flops_per_token(work.model, round(work.average))
    if not kind.generates:
        # A reward model scores a text, and computes no logits.
        training_flops -= 6 * config.vocab_size * config.hidden_size
    # Training is one forward and one backward pass, which count three.
    work.flops = work.rows * work.average * work.passes / 3 * training_flops


def _count_training(work: Workload) -> None:
    """Add the `rows`, `passes` and `at_once` of a stage that trains."""
    settings = work.settings
    kind = work.kind
    # How often each rollout is used.
    uses = settings.num_iterations or 1
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * work.processes
    steps = settings.max_steps
    if steps <= 0:
        rows_of_example = work.text / work.cut if work.packing else (settings.num_generations or 1) * uses
        steps = math.ceil(math.ceil(work.examples * rows_of_example / batch) * settings.num_train_epochs)
    work.rows = steps * batch * work.texts / uses
    rollout = settings.steps_per_generation or settings.gradient_accumulation_steps
    if kind.samples and settings.generation_batch_size:
        work.at_once = settings.generation_batch_size // work.processes
    elif kind.samples:
        work.at_once = settings.per_device_train_batch_size * rollout

    # A forward and a backward pass, and another forward pass if activations are recomputed.
    training = 3 + work.recompute
    if not kind.samples:
        work.passes = training + work.has_reference
        if kind.data == "unpaired":
            # To estimate the KL divergence, both models also read each prompt with the answer to another prompt.
            work.passes += 2
    elif kind.has_critic:
        # Sampling, old log-probabilities and values; then policy and critic are trained.
        work.passes = 3 + work.judges + work.has_reference + 2 * uses * training
    else:
        work.passes = 1 + work.judges + work.has_reference + uses * training
        # If a rollout is used in one step, training itself computes the old log-probabilities.
        if settings.gradient_accumulation_steps % (rollout * uses) > 0:
            work.passes += 1


def evaluation_seconds(step: Step, work: Workload, machine: Machine) -> float:
    """Return the time for answering instructions, prompts and problems, some of these `samples` times.

    `work` is the step that writes the model.
    """
    if not work.kind.generates:
        return START
    settings = Settings(**step.values)
    model = work.model
    rows = settings.limit or ROWS
    # Instructions, prompts and problems, and several answers to some of the problems.
    answers = 3 * rows + min(rows, SAMPLED) * (settings.samples or 0)
    positions = settings.max_new_tokens or DEFAULT_LENGTH
    seconds_per_position = model.config.get_text_config().num_hidden_layers * (VLLM_LAYER if settings.vllm else LAYER)
    # A prompt, and an answer that ends early.
    flops = answers * positions * 2 * ANSWER * 2 * model.num_parameters()
    computing = flops / (machine.mfu * (machine.processor.half or machine.processor.single))
    return START + math.ceil(answers / AT_ONCE) * positions * seconds_per_position + computing


def memory(work: Workload) -> dict[str, float]:
    """Return the bytes of one process, by part."""
    config = work.model.config.get_text_config()
    parameters = work.model.num_parameters()
    layers = config.num_hidden_layers
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Width of the keys of one layer, which is that of its values.
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    # Tokens of a batch.
    read = (work.settings.per_device_train_batch_size or 0) * work.texts * work.longest
    shares = work.processes if work.sharded else 1
    trained = work.trained / shares

    weights = 4 * trained
    if work.size == 2:
        # A copy in 16 bits; sharded weights are gathered and copied layer by layer.
        weights += 2 * parameters / (layers if work.sharded else 1)
    gradients = 4 * trained
    if work.processes > 1 and not work.sharded:
        # DDP has buckets for as many.
        gradients = 8 * trained
    layer = _layer_bytes(config, head * config.num_attention_heads, keys, work.size)
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
    if work.settings.use_peft and work.size == 2 and not work.sharded and work.settings.frozen_dtype != "float32":
        # The weights that are frozen under an adapter are converted, unless they are sharded.
        frozen_size = 2
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 8 * trained,
        "activations": read * activations,
        # Logits and their gradient and, in float32, a copy, its log-softmax and a gradient.
        "logits": logits * (2 * work.size + 3 * 4),
        "rollouts": work.at_once * work.longest * 2 * keys * layers * work.size,
        "frozen": work.frozen * parameters * frozen_size / shares,
        "other": LIBRARIES,
    }


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
    """Suggest what makes a stage fit into `room` bytes, the smallest change first."""
    batch = work.settings.per_device_train_batch_size or 0
    divisors = [size for size in range(batch, 0, -1) if batch % size == 0]
    # Smaller batches take less time than recomputing activations, so they come first.
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
    """What the steps so far write, by folder.

    Attributes:
        models: Models, on the meta device.
        templates: Tokens of a model's chat template with a system prompt, 0 if nothing is known.
        vocabularies: Sizes of tokenizers' vocabularies.
        rows: Numbers of rows of data sets.
        lengths: Tokens of a row of a data set.
    """

    models: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, int] = field(default_factory=dict)
    vocabularies: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)


def read_workload(step: Step, outputs: Outputs, machine: Machine) -> Workload | None:
    """Return the workload of a step, or None if it neither trains nor samples.

    `outputs` has what earlier steps write; what this step writes is added.
    """
    settings = read_settings(step)
    # Later steps need the size of the vocabulary, and the number of people's votes.
    if step.kind == "tokenizer":
        outputs.vocabularies[settings.output_dir] = settings.vocab_size
    if step.kind == "votes":
        outputs.rows[settings.output_dir] = settings.min_votes
    kind = step.stage
    if not kind.launched:
        return None

    model, template = _read_model(kind, settings, outputs)
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
        size=2 if has_half else 4,
        recompute=bool(recompute),
        packing=bool(kind.from_scratch or settings.packing),
        texts=2 if kind.data == "preference" else 1,
    )
    _count_rows(work, template, outputs)
    _count_networks(work)
    count_work(work)
    if kind.measured:
        outputs.models[settings.output_dir] = model
    else:
        outputs.rows[settings.output_dir] = (settings.max_prompts or work.examples) * settings.pairs_per_prompt
    outputs.lengths[settings.output_dir] = work.average
    outputs.templates[settings.output_dir] = template
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
    """Return the model that a stage starts from, on the meta device, and the tokens of its chat template."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.models.loading import load_config, load_tokenizer, user_error_for
    from pipeline.models.scratch import ScratchArguments, build_empty

    if kind.from_scratch:
        name = settings.tokenizer_name_or_path
        vocabulary = outputs.vocabularies.get(name) or len(load_tokenizer(name, "tokenizer_name_or_path"))
        return build_empty(settings.build(ScratchArguments), vocabulary), 0
    name = settings.model_name_or_path
    if name in outputs.models:
        return outputs.models[name], outputs.templates[name]
    with user_error_for("model_name_or_path", name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name, settings.model_revision), trust_remote_code=False)
    tokenizer = load_tokenizer(settings.tokenizer_name_or_path or name, "model_name_or_path")
    template = 0
    # Chat models may have a system prompt that is longer than a question.
    if tokenizer.chat_template:
        empty = [{"role": "user", "content": ""}]
        template = len(tokenizer.apply_chat_template(empty, add_generation_prompt=True, return_dict=False))
    return model, template


def _count_rows(work: Workload, template: int, outputs: Outputs) -> None:
    """Add the number of `examples`, and the tokens of a `text` and of the longest (`cut`).

    `template` are the tokens of the model's chat template, which are added to each prompt.
    """
    from pipeline.data.arguments import DataArguments
    from pipeline.data.splits import count_rows

    settings = work.settings
    content: Any = work.kind.data
    depends_on_rows = not settings.max_prompts and (settings.max_steps or 0) <= 0
    work.examples, tokens = count_rows(settings.build(DataArguments), content, outputs.rows, depends_on_rows)
    work.cut = settings.block_size or settings.max_length or settings.max_completion_length or settings.max_new_tokens
    work.cut = work.cut or work.model.config.get_text_config().max_position_embeddings
    share = ANSWER if work.kind.samples else TEXT
    work.text = tokens or outputs.lengths.get(str(settings.dataset_name)) or work.cut * share
    if work.kind.samples:
        work.text += template


def _count_networks(work: Workload) -> None:
    """Add the number of `trained` parameters, `judges`, reference and `frozen` networks."""
    from trl import ModelConfig

    from pipeline.models.adapters import count_trainable

    settings = work.settings
    if work.kind.measured:
        work.trained = count_trainable(work.model, settings.build(ModelConfig))
    work.judges = len(settings.reward_model_path or [])
    if isinstance(settings.reward_model_path, str):
        work.judges = 1
    penalty = settings.kl_coef if work.kind.has_critic else settings.beta
    work.has_reference = (penalty or 0) > 0
    adapts_critic = bool(settings.use_peft and settings.value_use_peft)
    work.frozen = work.judges
    if settings.use_peft or not work.trained:
        # With LoRA, the reference is the model without its adapter.
        work.frozen += 1 + adapts_critic
    else:
        work.frozen += work.has_reference
    if work.kind.has_critic and settings.use_peft and not adapts_critic:
        work.trained += work.model.num_parameters()
    elif work.kind.has_critic:
        work.trained *= 2
