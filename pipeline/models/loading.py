"""Configurations, tokenizers and trained models, by folder or Hub id; LoRA adapters included."""

import copy
import functools
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
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
from pipeline.models.tokenizer import validate_tokenizer
from pipeline.models.weights import validate_adapter, validate_complete, validate_files, weight_files

logger = logging.getLogger(__name__)

ARCHITECTURES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""Endings of transformers' class names for PEFT's task types."""


def skip_unreachable_hub() -> None:
    """Put the Hub's client into offline mode if the Hub does not answer: it would retry each request for 20 s."""
    hub = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), 3.0).close()
    except OSError as error:
        logger.warning("The Hub cannot be reached (%s): only local files and its cache are used.", error)
        constants.HF_HUB_OFFLINE = True


@contextmanager
def user_error_for(field: str, name: object, what: str = "model", *, checked: bool = False) -> Iterator[None]:
    """Raise a failure to load `what` as a `UserError` about the argument `field`, which named it `name`.

    If its files were `checked` before, an unexpected exception is a defect and keeps its traceback.
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
        reason = shorten(str(error) if is_expected else f"reading it fails with {type(error).__name__}: {error}", 250)
        if isinstance(error, MemoryError):
            reason = "there is not enough memory"
        remedy = HUB_UNREACHABLE if is_network_error(error) else f"no {what} can be loaded from it ({reason})"
        raise UserError(Problem(field, name, describe_folder(str(name)) or remedy)) from error


_download = functools.cache(snapshot_download)


def local_copy(name: str, inner: str | None = None) -> str:
    """Return what to load a model or a tokenizer from: the download of `NAME/repo@revision`, or `name` itself.

    With `inner`, the repository is always downloaded, and its subfolder of that name is returned if it exists.

    Raises:
        OSError: If the folder or the repository does not exist, or cannot be downloaded.
    """
    repo_id, revision = split_revision(name)
    # The Hub would be asked for `runs/pocket`.
    if is_missing_path(name):
        raise FileNotFoundError("there is no such folder")
    if os.path.exists(name) or (revision is None and inner is None):
        return name
    files = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
    checkpoints = ("checkpoint-*", "last-checkpoint/*")
    folder = Path(_download(repo_id, revision=revision, allow_patterns=files, ignore_patterns=checkpoints))
    return str(folder / inner if inner and (folder / inner).is_dir() else folder)


def load_tokenizer(name: str | None, field: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub (by default, of the branch "main"), which the argument `field` named.

    Raises:
        UserError: If the tokenizer cannot be loaded.
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
            if (base := base_of(name, revision)) is None:
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
    """Load a tokenizer. If its files add many tokens, which are compared pairwise, load it in a child process first."""
    options = {"revision": revision or "main", "trust_remote_code": False}
    load = functools.partial(transformers.AutoTokenizer.from_pretrained, name, **options)
    many = 20_000
    # An added token takes at least 100 bytes in tokenizer.json, and 4 in the lists of the other files.
    for file, size in (("tokenizer.json", 100), ("tokenizer_config.json", 4), ("special_tokens_map.json", 4)):
        path = Path(name) / file
        if path.is_file() and path.stat().st_size >= size * many:
            content = json.loads(path.read_text(encoding="utf-8"))
            count = longest_list(content.get("added_tokens") if file == "tokenizer.json" else content)
            if count > many and (fault := exceeded_limit(load)):
                raise RuntimeError(f"loading its {count:,} added tokens {fault}")
    return load()


def separate_pad_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make a tokenizer without its own pad token pad with an unused special token; `name` is for the log.

    If it has none, it pads with eos, because the trainers here know the lengths of rows.
    """
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    if eos is None or pad not in (None, eos):
        return
    taken = f"{eos} {tokenizer.bos_token} {tokenizer.chat_template}"
    turns = [{"role": role, "content": "Hello"} for role in ("user", "assistant")]
    # A template that does not work is reported by `validate_chat`.
    with suppress(TemplateError, *LIBRARY_ERRORS):
        taken += tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [token for token in special if token not in taken]
    free.sort(key=lambda token: ("pad" not in token.lower(), token != tokenizer.unk_token))
    tokenizer.pad_token = free[0] if free else eos
    reason = "it has no pad token" if pad is None else f"{pad} also ends answers"
    logger.warning("%s: the tokenizer pads with %s, because %s.", name, tokenizer.pad_token, reason)


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
    """Raise a `ValueError` if a model's files ask for more than any model has; arguments as for `load_config`."""
    if Path(name).is_dir():
        check_files(Path(name))
        return
    # A configuration that cannot be downloaded is reported when the model is loaded.
    with suppress(OSError):
        if file := cached_file(name, "config.json", revision=revision or "main"):
            check_files(Path(file).parent)


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Load the configuration of a model, or of an adapter's base model; arguments as for `load_tokenizer`.

    If an adapter is a classifier, `architectures` says so, and `num_labels` is 1, as with `RewardTrainer`.

    Raises:
        OSError, ValueError: If there is no configuration, or it is invalid.
    """
    name = local_copy(name)
    base = base_of(name, revision)
    adapter = PeftConfig.from_pretrained(name, revision=revision) if base else None
    # An adapter names a revision of its base model.
    revision = (adapter.revision if adapter else revision) or "main"
    check_config(base or name, revision)
    config = AutoConfig.from_pretrained(base or name, revision=revision, trust_remote_code=False)
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(item, str) for item in architectures):
        raise ValueError(f"`architectures` in its config.json is {architectures!r}, not a list of names")
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if layers < 1:
        raise ValueError(f"its config.json asks for {layers} layers")
    # Saving the trained model would do this as well, and fail at the end of the run.
    if (Path(base or name) / "generation_config.json").is_file():
        transformers.GenerationConfig.from_pretrained(base or name).validate(strict=True)
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
    """Report a reward model where a language model is wanted, or one with several labels. Return None if it is fine."""
    if not is_reward_model(config) or (reward and config.num_labels == 1):
        return None
    wanted = f"has {config.num_labels} labels; give a reward model, which has one"
    return wanted if reward else "is a reward model; give a language model"


def validate_weights(name: str, config: PreTrainedConfig, model_class: Any) -> str | None:
    """Report how the weights of a local model or adapter differ from what the `model_class` that will load it expects.

    For a model on the Hub, only the configuration is checked, which comes from `load_config`.
    """
    name = local_copy(name)
    folder, base = Path(name), base_of(name) if Path(name).is_dir() else None
    if base is not None:
        if fault := validate_adapter(folder):
            return fault
        folder, model_class = Path(base), AutoModelForCausalLM
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    # Compare the files with the class that saved them: a reward model may start from a language model.
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
    # Matching a pattern of modules may take forever.
    with torch.device("meta"):
        adapt = functools.partial(get_peft_model, model, low_cpu_mem_usage=True)
        if base is not None and (fault := exceeded_limit(lambda: adapt(PeftConfig.from_pretrained(name)))):
            return f"adding what its adapter_config.json asks for {fault}"
    # Buffers that are not in the files, such as a mask of positions, are made in loading: a few MB for a 1 GB model.
    if sum(buffer.nbytes for buffer in model.buffers()) > max(2 << 30, 4 * model.num_parameters()):
        return "its config.json asks for more than 2 GiB in addition to the weights; correct it"
    if not folder.is_dir():
        return None
    fault = validate_files(folder, model)
    # Reading larger files would delay training.
    if fault is None and sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 4 << 30:
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as weights:
                fault = fault or validate_finite((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118
    return f"its base model {base}: {fault}" if base and fault else fault


def validate_vocabulary(config: PreTrainedConfig, tokenizer: Any, whose: str = "its tokenizer") -> str | None:
    """Return the problem if the tokenizer has more tokens than the model. `whose` names it in the message."""
    known = getattr(config.get_text_config(), "vocab_size", None)
    if known is None or len(tokenizer) <= known:
        return None
    return f"knows {known} tokens and {whose} {len(tokenizer)}; give a model and a tokenizer that belong together"


def load_model(
    name: str,
    field: str,
    *,
    reward: bool = False,
    dtype: torch.dtype | None = None,
    chat: bool = True,
    tokenizer: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a chat model or a reward model with its tokenizer, and refuse a broken one.

    Args:
        name: A folder or an id on the Hub, which the argument `field` named; an adapter is merged into its base model.
        reward: Whether a reward model is wanted.
        dtype: Default: the dtype of the weights, or float32 if the machine emulates it.
        chat: Whether the tokenizer must be able to format conversations.
        tokenizer: A folder or an id on the Hub. Default: the model's.

    Raises:
        UserError: If the model or its tokenizer cannot be loaded, does not fit the other, or is broken.
    """
    words = load_tokenizer(tokenizer or name, field)
    model_class = transformers.AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with user_error_for(field, name):
        config = load_config(name)
        # Only the first fault is reported, and the most expensive check comes last.
        fault = (
            validate_kind(config, reward=reward)
            or (validate_chat(words) if chat else None)
            or validate_vocabulary(config, words)
            or validate_weights(name, config, model_class)
        )
        if fault is None:
            options = {"config": config, "dtype": dtype, "trust_remote_code": False}
            with without_table():
                model, loaded = model_class.from_pretrained(local_copy(name), output_loading_info=True, **options)
                avoid_emulation(model)
            fault = validate_complete(loaded["missing_keys"]) or validate_finite(model.named_parameters())
    if fault is not None:
        raise UserError(Problem(field, name, fault))
    # Unmerged, an adapter would add two small products to each product of the base in every forward pass.
    return without_adapters(model, in_place=True), words


def without_adapters(model: PreTrainedModel | PeftModel, *, in_place: bool = False) -> PreTrainedModel:
    """Return a model itself if it has no adapter, else a copy (or itself, `in_place`) with active adapters merged."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
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
    """Check that a tokenizer can format conversations. Return what is wrong, or None."""
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
def without_table() -> Iterator[None]:
    """Keep transformers from logging a table of missing weights, which are reported in one line here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def validate_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Report NaN or infinite weights, such as a diverged run leaves. Return None if all are finite."""
    for name, weight in weights:
        if weight.is_floating_point() and weight.element_size() > 1 and not torch.isfinite(weight).all():
            return f"its weights are not finite numbers ({name}); train it again"
    return None
