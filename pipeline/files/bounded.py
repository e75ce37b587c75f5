"""Try what a model's files ask for in a child process with limited time and memory.

A configuration may ask for 10^9 labels, a chat template may never end, and a tokenizer may double each letter sixty
times. None of that can be seen in the files, so it is first tried in a process that can be killed. The child is a fork,
which takes some milliseconds, and everything that it made disappears with it.
"""

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import psutil

MAX_LAYERS = 1024
"""Maximum number of layers. The deepest models in use have a few hundred, and a configuration names each of them."""
MAX_LABELS = 1 << 16
"""Maximum number of labels, which a configuration names one by one."""
MAX_ENTRIES = {
    "config.json": MAX_LABELS, "tokenizer_config.json": 200_000, "special_tokens_map.json": 200_000,
    "generation_config.json": 200_000, "adapter_config.json": 200_000,
}  # fmt: skip
"""Maximum number of list entries, by file. A speech model adds a token for each sound: Orpheus-3B has 28,672."""
MAX_MIB = {
    "tokenizer.json": 64, "vocab.json": 32, "added_tokens.json": 8, "special_tokens_map.json": 8,
    "tokenizer_config.json": 32, "config.json": 8, "generation_config.json": 8, "adapter_config.json": 8,
    "vocab.txt": 64, "merges.txt": 64, "tokenizer.model": 64, "spiece.model": 64, "sentencepiece.bpe.model": 64,
    "sentencepiece.model": 64, "spm.model": 64, "tiktoken.model": 64, ".jinja": 1, ".tiktoken": 64,
}  # fmt: skip
"""Maximum size of files that are read as a whole, by name or suffix. The largest tokenizer in use has 34 MB."""
SECONDS = 5
"""Seconds of CPU time. Building the largest models, without weights, takes two, and importing them another two."""
MEMORY = 1 << 30
"""Bytes that the child may use in addition to its copy of this process."""
PATIENCE_SECONDS = 30.0
"""Wall-clock limit, for a busy machine. A child that used less than a quarter of its CPU seconds gets no verdict."""
OUT_OF_MEMORY = 3
"""Exit code of a child without memory."""
OUT_OF_ROOM = 4
"""Exit code of a child whose call gave `TOO_LONG`."""
TOO_SLOW = "takes too long"
TOO_LARGE = "takes too much memory"
TOO_LONG = "gives too long a text"
"""A call may return this itself."""


def exceeded_limit(call: Callable[[], object], mapped: int = 0) -> str | None:
    """Call a function in a child process. Return the limit that it exceeds, as the end of a sentence, or None.

        fault = exceeded_limit(lambda: tokenizer.decode(...))    # None, or "takes too long"

    Only Linux forks safely; elsewhere the function is not called, and the result is None.

    Args:
        call: The function. Its result and errors are ignored, because the caller will see them; but it may return
            `TOO_LONG`.
        mapped: Bytes of a memory-mapped file, which do not count.
    """
    if sys.platform != "linux":
        return None
    import resource

    child = get_context("fork").Process(target=_run, args=(call, mapped))
    earlier_usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    with warnings.catch_warnings():
        # Other threads may hold locks that the child would wait for forever. PATIENCE_SECONDS ends that.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    try:
        child.join(PATIENCE_SECONDS)
    finally:
        is_over = child.exitcode is not None
        child.kill()
        child.join()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = usage.ru_utime + usage.ru_stime - earlier_usage.ru_utime - earlier_usage.ru_stime
    if not is_over:
        # On a busy machine, the child may be killed early. It is only to blame if it used a good part of its seconds.
        if seconds > SECONDS / 4:
            return TOO_SLOW
        return None
    # A negative code is the signal that ended the child.
    code = child.exitcode or 0
    if code < 0 and seconds > SECONDS - 1:
        return TOO_SLOW
    if code == OUT_OF_ROOM:
        return TOO_LONG
    if code < 0 or code == OUT_OF_MEMORY:
        # A C or Rust library that runs out of memory or stack aborts.
        return TOO_LARGE
    return None


def _run(call: Callable[[], object], mapped: int) -> NoReturn:
    """Call a function in this child process within the limits, and end it with an exit code; print nothing."""
    import faulthandler
    import resource

    code = 0
    try:
        faulthandler.disable()
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silent, stream)
        memory = psutil.Process().memory_info().vms + mapped + MEMORY
        limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_AS: memory}
        for limit, value in limits.items():
            # A lower limit, set by the user, cannot be raised.
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(limit, (value, value))
        if call() is TOO_LONG:
            code = OUT_OF_ROOM
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
        if "allocate memory" in str(error):
            code = OUT_OF_MEMORY
    finally:
        os._exit(code)


def check_files(folder: Path) -> None:
    """Raise a `ValueError` if a config.json or a tokenizer's files ask for more than any model has."""
    for file in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        if file.is_file():
            _check_size(file)
    file = folder / "config.json"
    if not file.is_file():
        return
    content = _read(file)
    kernel = named_kernel(content)
    if kernel is not None:
        raise ValueError(f"its config.json names the kernel {kernel}, which is code from the Hub; delete that line")
    numbers = list(_numbers(content))
    for name, value in numbers:
        # Other names may count something else: from layer `max_window_layers` on, layers attend to a window.
        if re.fullmatch(r"(num_hidden|num|n)_layers?", name) and value > MAX_LAYERS:
            raise ValueError(f"its config.json asks for {value} layers")
        if name == "num_labels" and value > MAX_LABELS:
            raise ValueError(f"its config.json asks for {value} labels")

    def build() -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    unusual = [f"{name}: {value}" for name, value in numbers if _is_unusual(name, value)]
    if unusual:
        fault = exceeded_limit(build)
        if fault is not None:
            raise ValueError(f"building the model of its config.json ({', '.join(unusual[:3])}) {fault}")


def _check_size(file: Path) -> None:
    """Raise a `ValueError` if a model's file is larger, or has a longer list, than any model needs."""
    limit = MAX_MIB.get(file.name) or MAX_MIB.get(file.suffix)
    if limit and file.stat().st_size > limit << 20:
        raise ValueError(f"its {file.name} is larger than {limit} MiB")
    if file.name in MAX_ENTRIES and longest_list(_read(file)) > MAX_ENTRIES[file.name]:
        raise ValueError(f"its {file.name} has a list of more than {MAX_ENTRIES[file.name]:,} entries")


def _is_unusual(name: str, value: int) -> bool:
    """Return whether a number in a configuration is above those of usual models, so that building has to be tried.

    Usual models have up to 1,024 parts of a kind, and sizes of up to 2^24.
    """
    is_count = re.search(r"^(num|n)_|layer|expert|block|head|depth|stage", name) is not None
    return value > (1024 if is_count else 1 << 24)


def _read(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise a `ValueError` that names the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {file.name} is not JSON in UTF-8: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"its {file.name} is not a JSON object")
    return content


def named_kernel(value: Any) -> str | None:
    """Return the repository of kernels that a configuration names anywhere, or None.

    transformers would download and import it, if the package `kernels` is installed:
    `attn_implementation: kernels-community/flash-attn`.
    """
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return None
    for key, item in value.items():
        if isinstance(item, str) and "_implementation" in str(key) and "/" in item:
            return item
        kernel = named_kernel(item)
        if kernel is not None:
            return kernel
    return None


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a configuration, each with the key that names it."""
    if isinstance(value, dict):
        for key, item in value.items():
            # Labels may have any name and any number.
            if key != "label2id":
                yield from _numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int):
        yield name, value


def longest_list(value: Any) -> int:
    """Return the number of entries of the longest list or mapping in a JSON value."""
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list):
        items = value
    else:
        return 0
    return max([len(items), *map(longest_list, items)])
