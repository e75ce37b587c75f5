"""What the steps of a run take, by arithmetic: FLOPs, memory of a process, and seconds. Nothing is trained.

A step's `Settings` are its values with its recipe's defaults; `read_stage` adds what follows from them and from the
steps before it, such as the model and the length of a row.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.evaluate_yaml import DEFAULT_LENGTH
from pipeline.runner.steps import Step

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


def count_work(stage: Settings) -> None:
    """Add the workload to a stage's settings.

    They are `rows` of blocks, texts (two in a pair), or prompts and answers; `average` and `longest`, the tokens of a
    row; `passes` over each token (a backward pass counts as two); `at_once`, the answers that a process samples at
    once; and `flops`, the FLOPs of all processes.
    """
    from pipeline.models.experts import training_flops_per_token

    kind = stage.kind
    stage.longest = stage.cut
    stage.average = stage.cut if stage.packing else min(stage.text, stage.cut)
    if kind.samples:
        stage.longest = stage.text + stage.cut
        stage.average = stage.text + ANSWER * stage.cut
    if kind.measured:
        _count_training(stage)
    else:
        # Answers are also sampled for validation and test, for people or annotators to choose from.
        held_out = stage.max_eval_prompts or 0
        prompts = (stage.max_prompts or stage.data) + held_out + (stage.max_validation_prompts or held_out)
        stage.rows = prompts * stage.samples_per_prompt
        stage.passes = 1
        stage.at_once = stage.batch_size

    config = stage.model.config.get_text_config()
    training_flops = training_flops_per_token(stage.model, round(stage.average))
    if not kind.generates:
        # A reward model scores a text, and computes no logits.
        training_flops -= 6 * config.vocab_size * config.hidden_size
    # Training is one forward and one backward pass, which count three.
    stage.flops = stage.rows * stage.average * stage.passes / 3 * training_flops


def _count_training(stage: Settings) -> None:
    """Add the `rows`, `passes` and `at_once` of a stage that trains."""
    kind = stage.kind
    # How often each rollout is used.
    uses = stage.num_iterations or 1
    batch = stage.per_device_train_batch_size * stage.gradient_accumulation_steps * stage.processes
    steps = stage.max_steps
    if steps <= 0:
        rows_of_example = stage.text / stage.cut if stage.packing else (stage.num_generations or 1) * uses
        steps = math.ceil(math.ceil(stage.data * rows_of_example / batch) * stage.num_train_epochs)
    stage.rows = steps * batch * stage.texts / uses
    rollout = stage.steps_per_generation or stage.gradient_accumulation_steps
    stage.at_once = 0
    if kind.samples and stage.generation_batch_size:
        stage.at_once = stage.generation_batch_size // stage.processes
    elif kind.samples:
        stage.at_once = stage.per_device_train_batch_size * rollout

    # A forward and a backward pass, and another forward pass if activations are recomputed.
    training = 3 + stage.recompute
    if not kind.samples:
        stage.passes = training + stage.reference
        if kind.data == "unpaired":
            # Policy and reference of KTO also read each prompt with the answer to another one.
            stage.passes += 2
    elif kind.has_critic:
        # Sampling, old log-probabilities and values; then policy and critic are trained.
        stage.passes = 3 + stage.judges + stage.reference + 2 * uses * training
    else:
        stage.passes = 1 + stage.judges + stage.reference + uses * training
        # If a rollout is used in one step, training itself computes the old log-probabilities.
        if stage.gradient_accumulation_steps % (rollout * uses) > 0:
            stage.passes += 1


def evaluation_seconds(step: Step, stage: Settings, machine: Machine) -> float:
    """Return the time for answering instructions, prompts and problems, some of these `samples` times."""
    if not stage.kind.generates:
        return START
    settings = Settings(**step.values)
    model = stage.model
    rows = settings.limit or ROWS
    # Instructions, prompts and problems, and several answers to some of the problems.
    answers = 3 * rows + min(rows, SAMPLED) * (settings.samples or 0)
    positions = settings.max_new_tokens or DEFAULT_LENGTH
    seconds_per_position = model.config.get_text_config().num_hidden_layers * (VLLM_LAYER if settings.vllm else LAYER)
    # A prompt, and an answer that ends early.
    flops = answers * positions * 2 * ANSWER * 2 * model.num_parameters()
    computing = flops / (machine.mfu * (machine.processor.half or machine.processor.single))
    return START + math.ceil(answers / AT_ONCE) * positions * seconds_per_position + computing


def memory(stage: Settings) -> dict[str, float]:
    """Return the bytes of one process, by part."""
    config = stage.model.config.get_text_config()
    parameters = stage.model.num_parameters()
    layers = config.num_hidden_layers
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Width of the keys of one layer, which is that of its values.
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    # Tokens of a batch.
    read = (stage.per_device_train_batch_size or 0) * stage.texts * stage.longest
    shares = stage.processes if stage.sharded else 1
    trained = stage.trained / shares

    weights = 4 * trained
    if stage.size == 2:
        # A copy in 16 bits; sharded weights are gathered and copied layer by layer.
        weights += 2 * parameters / (layers if stage.sharded else 1)
    gradients = 4 * trained
    if stage.processes > 1 and not stage.sharded:
        # DDP has buckets for as many.
        gradients = 8 * trained
    layer = _layer_bytes(config, head * config.num_attention_heads, keys, stage.size)
    activations = layers * layer
    if stage.recompute:
        # Only the inputs of all layers are kept, plus everything of one layer at a time.
        activations = layers * 4 * config.hidden_size + layer
    logits = 0.0
    if stage.kind.generates:
        # Pretraining has all logits at once, TRL's trainers have a tile of them, and a reward model only has scores.
        most = math.inf if stage.kind.from_scratch else TILE
        logits = min(most, read * config.vocab_size)
    frozen_size = 4
    if stage.use_peft and stage.size == 2 and not stage.sharded and stage.frozen_dtype != "float32":
        # The weights that are frozen under an adapter are converted, unless they are sharded.
        frozen_size = 2
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 8 * trained,
        "activations": read * activations,
        # Logits and their gradient and, in float32, a copy, its log-softmax and a gradient.
        "logits": logits * (2 * stage.size + 3 * 4),
        "rollouts": stage.at_once * stage.longest * 2 * keys * layers * stage.size,
        "frozen": stage.frozen * parameters * frozen_size / shares,
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


def advice(stage: Settings, room: float) -> str:
    """Suggest what makes a stage fit into `room` bytes, the smallest change first."""
    batch = stage.per_device_train_batch_size or 0
    divisors = [size for size in range(batch, 0, -1) if batch % size == 0]
    for recompute in (stage.recompute, True):
        for size in divisors:
            smaller = Settings(**{**vars(stage), "recompute": recompute, "per_device_train_batch_size": size})
            if sum(memory(smaller).values()) > room:
                continue
            changes: list[str] = []
            if recompute and not stage.recompute:
                changes.append("--activation_checkpointing true")
            if size < batch:
                times = batch // size
                changes.append(f"--per_device_train_batch_size {size} and {times} times the gradient accumulation")
            return ", ".join(changes)
    larger = "LoRA (use_peft: true), more or larger GPUs"
    if stage.kind.has_critic:
        return larger
    return f"{larger}, or recipes/accelerate/fsdp2.yaml or zero3.yaml"


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


def read_stage(step: Step, outputs: Outputs, machine: Machine) -> Settings | None:
    """Return the settings of a step with derived values, or None if it neither trains nor samples.

    The derived values are `kind`, the entry in `STAGES`; `model` on the meta device; `trained` parameters; `data` rows
    of `texts` (two in a pair), each of `text` tokens (of a prompt, if answers are sampled); `cut`, the longest text or
    answer; `judges` and `reference`, the numbers of such networks, and `frozen`, that of all networks that are not
    trained; `recompute`; `size`, the bytes of an activation; `processes` and `sharded`; and those of `count_work`.

    `outputs` has what earlier steps write; what this step writes is added.
    """
    from trl import ModelConfig

    from pipeline.data.arguments import DataArguments
    from pipeline.data.splits import count_rows
    from pipeline.models.adapters import count_trainable

    kind = step.stage
    defaults: dict[str, Any] = {}
    for arguments in step.argument_types:
        for item in dataclasses.fields(arguments):
            if item.default is not dataclasses.MISSING:
                defaults[item.name] = item.default
    stage = Settings(**{**defaults, **step.values})
    # Later steps need the size of the vocabulary, and the number of people's votes.
    if step.kind == "tokenizer":
        outputs.vocabularies[stage.output_dir] = stage.vocab_size
    if step.kind == "votes":
        outputs.rows[stage.output_dir] = stage.min_votes
    if not kind.launched:
        return None

    stage.kind = kind
    stage.model, template = _read_model(stage, outputs)
    content: Any = kind.data
    depends_on_rows = not stage.max_prompts and (stage.max_steps or 0) <= 0
    stage.data, text = count_rows(stage.build(DataArguments), content, outputs.rows, depends_on_rows)
    stage.trained = 0
    if kind.measured:
        stage.trained = count_trainable(stage.model, stage.build(ModelConfig))
        outputs.models[stage.output_dir] = stage.model
    else:
        outputs.rows[stage.output_dir] = (stage.max_prompts or stage.data) * stage.pairs_per_prompt
    _count_networks(stage)
    stage.packing = kind.from_scratch or stage.packing
    stage.recompute = bool(stage.gradient_checkpointing)
    if stage.activation_checkpointing is not None:
        stage.recompute = bool(stage.activation_checkpointing)
    stage.texts = 2 if content == "preference" else 1
    stage.processes = machine.processes
    stage.sharded = machine.sharded and not kind.has_critic
    stage.cut = stage.block_size or stage.max_length or stage.max_completion_length or stage.max_new_tokens
    stage.cut = stage.cut or stage.model.config.get_text_config().max_position_embeddings
    share = ANSWER if kind.samples else TEXT
    stage.text = text or outputs.lengths.get(str(stage.dataset_name)) or stage.cut * share
    if kind.samples:
        stage.text += template
    has_half = machine.processor.half and (step.values.get("bf16") is not False or stage.fp16)
    stage.size = 2 if has_half else 4
    count_work(stage)
    outputs.lengths[stage.output_dir] = stage.average
    outputs.templates[stage.output_dir] = template
    return stage


def _read_model(stage: Settings, outputs: Outputs) -> tuple[Any, int]:
    """Return the model that a stage starts from, on the meta device, and the tokens of its chat template."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.models.loading import load_config, load_tokenizer, user_error_for
    from pipeline.models.scratch import ScratchArguments, build_empty

    if stage.kind.from_scratch:
        name = stage.tokenizer_name_or_path
        vocabulary = outputs.vocabularies.get(name) or len(load_tokenizer(name, "tokenizer_name_or_path"))
        return build_empty(stage.build(ScratchArguments), vocabulary), 0
    name = stage.model_name_or_path
    if name in outputs.models:
        return outputs.models[name], outputs.templates[name]
    with user_error_for("model_name_or_path", name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name, stage.model_revision), trust_remote_code=False)
    tokenizer = load_tokenizer(stage.tokenizer_name_or_path or name, "model_name_or_path")
    template = 0
    # Chat models may have a system prompt that is longer than a question.
    if tokenizer.chat_template:
        empty = [{"role": "user", "content": ""}]
        template = len(tokenizer.apply_chat_template(empty, add_generation_prompt=True, return_dict=False))
    return model, template


def _count_networks(stage: Settings) -> None:
    """Add the numbers of `judges`, `reference` and `frozen` networks, and the `trained` parameters of the critic."""
    stage.judges = len(stage.reward_model_path or [])
    if isinstance(stage.reward_model_path, str):
        stage.judges = 1
    penalty = stage.kl_coef if stage.kind.has_critic else stage.beta
    stage.reference = (penalty or 0) > 0
    adapts_critic = bool(stage.use_peft and stage.value_use_peft)
    stage.frozen = stage.judges
    if stage.use_peft or not stage.trained:
        # With LoRA, the reference is the model without its adapter.
        stage.frozen += 1 + adapts_critic
    else:
        stage.frozen += stage.reference
    if stage.kind.has_critic:
        whole_critic = stage.use_peft and not adapts_critic
        stage.trained += stage.model.num_parameters() if whole_critic else stage.trained
