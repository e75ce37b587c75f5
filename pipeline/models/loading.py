"""Configurations, tokenizers and trained models, by folder or Hub id; LoRA adapters included."""

import copy
import functools
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from huggingface_hub import constants, snapshot_download
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from pipeline import hardware
from pipeline.errors import HUB_UNREACHABLE, LIBRARY_ERRORS, Problem, UserError, is_network_error
from pipeline.files import describe_folder, is_missing_path, split_revision
from pipeline.files.bounded import check_files, exceeded_limit, longest_list
from pipeline.models.tokenizer import separate_pad_token, validate_tokenizer
from pipeline.models.weights import validate_adapter, validate_complete, validate_files, validate_finite, weight_files

logger = logging.getLogger(__name__)

ARCHITECTURES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""Endings of transformers' class names for PEFT's task types."""
MANY_ADDED_TOKENS = 20_000
"""With more added tokens than this, which are compared pairwise, a tokenizer is first loaded in a child process."""
ADDED_TOKEN_BYTES = {"tokenizer.json": 100, "tokenizer_config.json": 4, "special_tokens_map.json": 4}
"""Files that may add tokens, and the minimum number of bytes that each of them spends on one."""
MAX_EXTRA_BYTES = 2 << 30
"""Maximum size of what a model makes in addition to its weights, such as a mask of positions."""
MAX_READ_BYTES = 4 << 30
"""Size of weight files up to which they are read before training, to find numbers that are not finite."""


def skip_unreachable_hub() -> None:
    """Put the Hub's client into offline mode if the Hub does not answer: it would retry each request for 20 s.

    Local files and what is in the Hub's cache still load. Behind a proxy, nothing is tried.
    """
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    default_port = 80 if hub.scheme == "http" else 443
    try:
        socket.create_connection((hub.hostname, hub.port or default_port), timeout=3.0).close()
    except OSError as error:
        logger.warning("The Hub cannot be reached (%s): only local files and its cache are used.", error)
        constants.HF_HUB_OFFLINE = True


@contextmanager
def user_error_for(field: str, name: object, what: str = "model", *, checked: bool = False) -> Iterator[None]:
    """Raise a failure to load `what` as a `UserError` about the argument `field`, which named it `name`.

    Args:
        field: Argument that named it, for the message.
        name: Folder or Hub id, the value of that argument.
        what: What is loaded, for the message: "model", "tokenizer", ...
        checked: Whether its files were checked before. An unexpected exception is then a defect of this library, and
            keeps its traceback.

    Raises:
        UserError: If the block raises an exception with which libraries reject files; unless `checked`, any exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Libraries reject files with these. A damaged tokenizer.json or config.json may raise anything.
        rejections = OSError | ValueError | RuntimeError | UserWarning | SafetensorError | MemoryError
        is_expected = isinstance(error, rejections)
        if checked and not is_expected:
            raise
        if isinstance(error, MemoryError):
            reason = "there is not enough memory"
        elif is_expected:
            reason = shorten(str(error), 250)
        else:
            reason = shorten(f"reading it fails with {type(error).__name__}: {error}", 250)
        remedy = f"no {what} can be loaded from it ({reason})"
        if is_network_error(error):
            remedy = HUB_UNREACHABLE
        # A folder without a model is described by what it is instead.
        raise UserError(Problem(field, name, describe_folder(str(name)) or remedy)) from error


_download = functools.cache(snapshot_download)


def local_copy(name: str, inner: str | None = None) -> str:
    """Return what to load a model or a tokenizer from: the download of `NAME/repo@revision`, or `name` itself.

    A Hub id without a revision is returned as it is, since `from_pretrained` downloads it.

    Args:
        name: A folder, a Hub id, or a Hub id with a revision.
        inner: A subfolder to return instead, if the repository has it. A repository is then always downloaded.

    Raises:
        OSError: If the folder or the repository does not exist, or cannot be downloaded.
    """
    repo_id, revision = split_revision(name)
    # Otherwise, the Hub would be asked for a folder such as `runs/pocket` that does not exist yet.
    if is_missing_path(name):
        raise FileNotFoundError("there is no such folder")
    if os.path.exists(name) or (revision is None and inner is None):
        return name
    files = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
    checkpoints = ("checkpoint-*", "last-checkpoint/*")
    folder = Path(_download(repo_id, revision=revision, allow_patterns=files, ignore_patterns=checkpoints))
    if inner and (folder / inner).is_dir():
        folder = folder / inner
    return str(folder)


def load_tokenizer(name: str | None, field: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer, which pads with another token than the one that ends answers, if it has one to spare.

    Args:
        name: A folder or an id on the Hub. An adapter without a tokenizer has that of its base model.
        field: Argument that named it, for messages.
        revision: Branch, tag or commit on the Hub. Default: "main".

    Raises:
        UserError: If there is no name, or the tokenizer cannot be loaded, or it exceeds the limits of `files.bounded`.
    """
    if not name:
        raise UserError(Problem(field, "nothing", "give a Hub id or a folder"))
    with user_error_for(field, name, "tokenizer"):
        name = local_copy(name)
        check_config(name, revision)
        try:
            tokenizer = _load_tokenizer(name, revision)
        except (OSError, ValueError):
            # Adapters on the Hub may come without a tokenizer. Take the one of the base model.
            base = base_of(name, revision)
            if base is None:
                raise
            check_config(base)
            tokenizer = _load_tokenizer(base, None)
        if fault := validate_tokenizer(tokenizer):
            raise ValueError(fault)
        # Encoding a word fails if a setting in its files has the wrong type.
        tokenizer("Hello")
    separate_pad_token(tokenizer, name)
    # transformers would warn of an error for long rows, but they are truncated or skipped here, and reported.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Load a tokenizer. If its files add more than `MANY_ADDED_TOKENS`, load it in a child process first.

    Raises:
        RuntimeError: If loading it there takes too long or too much memory.
    """
    load = functools.partial(
        transformers.AutoTokenizer.from_pretrained, name, revision=revision or "main", trust_remote_code=False
    )
    for file, size in ADDED_TOKEN_BYTES.items():
        path = Path(name) / file
        # Most files are too small to add that many, and need not be parsed.
        if not path.is_file() or path.stat().st_size < size * MANY_ADDED_TOKENS:
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        # The other files may add the tokens of any list. The other lists of tokenizer.json are vocabulary and merges.
        lists = content.get("added_tokens") if file == "tokenizer.json" else content
        added_tokens = longest_list(lists)
        if added_tokens > MANY_ADDED_TOKENS and (fault := exceeded_limit(load)):
            raise RuntimeError(f"loading its {added_tokens:,} added tokens {fault}")
    return load()


def base_of(name: str, revision: str | None = None) -> str | None:
    """Return the base model of a PEFT adapter, or None if `name`, a folder or Hub id, is not an adapter.

    Raises:
        ValueError: If the base model is a folder that does not exist, for instance because the run was moved.
    """
    name = local_copy(name)
    if find_adapter_config_file(name, revision=revision) is None:
        return None
    base = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path
    if base and is_missing_path(base):
        raise ValueError(f"there is no folder {base}; correct base_model_name_or_path in its adapter_config.json")
    return base


def check_config(name: str, revision: str | None = None) -> None:
    """Raise a `ValueError` if a model's files ask for more than any model has; arguments as for `load_config`.

    Of a model on the Hub, this downloads config.json only.
    """
    if Path(name).is_dir():
        check_files(Path(name))
        return
    # A configuration that cannot be downloaded is reported when the model is loaded.
    with suppress(OSError):
        file = cached_file(name, "config.json", revision=revision or "main")
        if file is not None:
            check_files(Path(file).parent)


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Load the configuration of a model, or of an adapter's base model.

    If an adapter is a classifier, `architectures` says so, and `num_labels` is 1, as with `RewardTrainer`.

    Args:
        name: A folder or an id on the Hub.
        revision: Branch, tag or commit on the Hub. Default: "main".

    Raises:
        OSError, ValueError: If there is no configuration, it is invalid, or it asks for more than any model has.
    """
    name = local_copy(name)
    adapter = None
    source = name
    if base := base_of(name, revision):
        adapter = PeftConfig.from_pretrained(name, revision=revision)
        source = base
        # An adapter names a revision of its base model.
        revision = adapter.revision
    revision = revision or "main"
    check_config(source, revision)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(item, str) for item in architectures):
        raise ValueError(f"`architectures` in its config.json is {architectures!r}, not a list of names")
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if layers < 1:
        raise ValueError(f"its config.json asks for {layers} layers")
    # Otherwise, saving the trained model would reject a faulty file at the end of the run.
    if (Path(source) / "generation_config.json").is_file():
        transformers.GenerationConfig.from_pretrained(source).validate(strict=True)
    if adapter and adapter.task_type in ARCHITECTURES:
        config.num_labels = 1
        config.architectures = [ARCHITECTURES[adapter.task_type]]
    return config


def load_base_config(name: str | None, revision: str | None = None) -> PreTrainedConfig:
    """Load the configuration of the model that `model_name_or_path` names, to train it; arguments as for `load_config`.

    Raises:
        UserError: If it cannot be loaded, or the model is an adapter that cannot be merged into its base model.
    """
    field = "model_name_or_path"
    if not name:
        raise UserError(Problem(field, "nothing", "give a Hub id or a folder"))
    with user_error_for(field, name):
        base = base_of(name, revision)
        if base and PeftConfig.from_pretrained(name, revision=revision).is_prompt_learning:
            remedy = "is a learned prompt, which cannot be merged into its base model; give another adapter"
            raise UserError(Problem(field, name, remedy))
    described = f"{base}, the base model of {name}" if base else name
    with user_error_for(field, described):
        return load_config(name, revision)


def is_reward_model(config: PreTrainedConfig) -> bool:
    """Return whether a model is a sequence classifier, by the configuration that `load_config` returns."""
    return any("SequenceClassification" in name for name in config.architectures or ())


def validate_kind(config: PreTrainedConfig, *, reward: bool) -> str | None:
    """Check that a model is of the right kind: a reward model has one label, and a language model is no reward model.

    Args:
        config: From `load_config`.
        reward: Whether a reward model may be used. A language model may always be used.

    Returns:
        The remedy of a `Problem`, or None if the kind is right.
    """
    if not is_reward_model(config):
        return None
    if not reward:
        return "is a reward model; give a language model"
    if config.num_labels != 1:
        return f"has {config.num_labels} labels; give a reward model, which has one"
    return None


def validate_weights(name: str, config: PreTrainedConfig, model_class: Any) -> str | None:
    """Check the weights of a local model or adapter before TRL loads it, which would not report them.

    TRL would train a model with random numbers instead of missing weights, and one with NaN until the loss is NaN.

    Args:
        name: A folder or an id on the Hub. Of a model on the Hub, only the configuration is checked.
        config: Its configuration, from `load_config`.
        model_class: Class of transformers that will load it, for instance `AutoModelForCausalLM`.

    Returns:
        What is wrong and what to do, as the remedy of a `Problem`, or None.
    """
    return validate_layout(name, config, model_class) or _validate_stored_numbers(name)


def validate_layout(name: str, config: PreTrainedConfig, model_class: Any) -> str | None:
    """Check that a model can be built, and that the headers of its weight files fit it; as for `validate_weights`.

    No weights are read, so this needs little memory whatever the files of the model claim.
    """
    folder, base = _weights_folder(name)
    if base is not None:
        if fault := validate_adapter(Path(local_copy(name))):
            return fault
        model_class = AutoModelForCausalLM
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    # Compare the files with the class that saved them, which may be another one than `model_class`: a reward model may
    # start from a language model.
    saved_by = getattr(transformers, (config.architectures or [""])[0], None) or model_class
    try:
        with torch.device("meta"):
            model = model_class.from_config(config, trust_remote_code=False)
            if hasattr(saved_by, "_from_config") and saved_by is not type(model):
                model = saved_by._from_config(config)
    except LIBRARY_ERRORS as error:
        if isinstance(error, ValueError) and type(config) not in getattr(model_class, "_model_mapping", ()):
            return f"is a {config.model_type} model, which cannot be used here"
        return f"its {config.model_type} model cannot be built ({shorten(str(error), 200)})"
    if base is not None and (fault := exceeded_limit(lambda: _build_adapter(model, name))):
        return f"adding what its adapter_config.json asks for {fault}"
    # Loading makes buffers that are not in the files, such as a mask of positions: normally a few MB for a 1 GB model.
    if sum(buffer.nbytes for buffer in model.buffers()) > max(MAX_EXTRA_BYTES, 4 * model.num_parameters()):
        return "its config.json asks for more than 2 GiB in addition to the weights; correct it"
    if not folder.is_dir():
        return None
    return _name_base(validate_files(folder, model), base)


def _weights_folder(name: str) -> tuple[Path, str | None]:
    """Return the folder with the weights of a model, and None; of an adapter, its base model's folder and name.

    For a model on the Hub, the folder does not exist, and an adapter counts as any other model.
    """
    folder = Path(local_copy(name))
    base = None
    if folder.is_dir():
        base = base_of(str(folder))
    if base is None:
        return folder, None
    return Path(base), base


def _build_adapter(model: PreTrainedModel, name: str) -> None:
    """Add the modules of an adapter to its base model on the meta device. Matching its pattern may take forever."""
    with torch.device("meta"):
        get_peft_model(model, PeftConfig.from_pretrained(local_copy(name)), low_cpu_mem_usage=True)


def _validate_stored_numbers(name: str) -> str | None:
    """Report weights that are not finite numbers in the files of a local model, or of an adapter's base model."""
    folder, base = _weights_folder(name)
    if not folder.is_dir():
        return None
    # Reading larger files would delay training.
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) > MAX_READ_BYTES:
        return None
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            fault = validate_finite((key, weights.get_tensor(key)) for key in weights.keys())  # noqa: SIM118
        if fault:
            return _name_base(fault, base)
    return None


def _name_base(fault: str | None, base: str | None) -> str | None:
    """Return a fault with the name of the base model that has it; the fault as it is if `base` is None."""
    if fault and base:
        return f"its base model {base}: {fault}"
    return fault


def validate_vocabulary(config: PreTrainedConfig, tokenizer: Any, description: str = "its tokenizer") -> str | None:
    """Report a tokenizer with more tokens than the model, or return None. Messages name it by its `description`."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None or len(tokenizer) <= size:
        return None
    return f"knows {size} tokens and {description} {len(tokenizer)}; give a model and a tokenizer that belong together"


def load_model(
    name: str,
    field: str,
    *,
    reward: bool = False,
    dtype: torch.dtype | None = None,
    chat: bool = True,
    tokenizer: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a chat model or a reward model with its tokenizer, and reject a broken one.

    Args:
        name: A folder or an id on the Hub. An adapter is merged into its base model.
        field: Argument that named it, for messages.
        reward: Whether it must be a reward model.
        dtype: Default: the dtype of the weights, or float32 if the machine emulates it.
        chat: Whether the tokenizer must be able to format conversations.
        tokenizer: A folder or an id on the Hub. Default: the model's.

    Raises:
        UserError: If the model or its tokenizer cannot be loaded, does not fit the other, or is broken.
    """
    loaded_tokenizer = load_tokenizer(tokenizer or name, field)
    model_class = transformers.AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with user_error_for(field, name):
        config = load_config(name)
        # Only the first fault is reported, and the most expensive check comes last.
        fault = validate_kind(config, reward=reward)
        if fault is None and chat:
            fault = validate_chat(loaded_tokenizer)
        fault = fault or validate_vocabulary(config, loaded_tokenizer) or validate_layout(name, config, model_class)
        if fault is None:
            with hide_table_of_weights():
                model, info = model_class.from_pretrained(
                    local_copy(name), config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
                )
                avoid_emulation(model)
            fault = validate_complete(info["missing_keys"]) or validate_finite(model.named_parameters())
    if fault is not None:
        raise UserError(Problem(field, name, fault))
    # Unmerged, an adapter would add two small products to each product of the base in every forward pass.
    return without_adapters(model, in_place=True), loaded_tokenizer


def without_adapters(model: PreTrainedModel | PeftModel, *, in_place: bool = False) -> PreTrainedModel:
    """Merge the active adapters of a model into its weights.

    Return the model itself if it has no adapters or if this happens `in_place`, else a copy of it.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if not any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules()):
        return model
    merged = model if in_place else copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            merged.set_submodule(name, plain)
    # Adapters of several parameters of one layer wrap each other: the inner ones come first.
    for name, module in reversed(list(merged.named_modules())):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            merged.set_submodule(name, module.base_layer)
    # transformers remembers that it loaded adapters, and would only save these, under the names in their file.
    merged._hf_peft_config_loaded = False
    merged._weight_conversions = None
    return merged


def avoid_emulation(model: PreTrainedModel) -> None:
    """Convert a model to float32 if the machine emulates products in its dtype."""
    if any(hardware.is_emulated(weight.dtype) for weight in model.parameters()):
        model.float()


def validate_chat(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Report a tokenizer that cannot format conversations, as the remedy of a `Problem`, or return None."""
    if not tokenizer.chat_template:
        return "its tokenizer has no chat template; give a model tuned on conversations"
    if tokenizer.eos_token_id is None:
        return "its tokenizer has no eos token, with which answers end; add one"
    try:
        if tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], return_dict=False):
            return None
        reason = "it makes no tokens of a question"
    except (TemplateError, *LIBRARY_ERRORS) as error:
        reason = str(error)
    return f"its chat template does not work ({reason}); correct it"


@contextmanager
def hide_table_of_weights() -> Iterator[None]:
    """Keep transformers from logging a table of missing weights, which are reported in one line here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
