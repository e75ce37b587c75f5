"""Try what a model's files ask for in a child process, which can neither hang nor fill the memory of the machine.

A configuration may ask for 10^9 labels, a chat template may never end, and a tokenizer may double each letter sixty
times. None of that can be seen in the files, so it is done first where it can be ended. The child is a fork, which
takes some milliseconds, and whatever it has made ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

SECONDS = 20
"""Seconds of CPU time; building the largest models, without their weights, takes two."""

MEMORY = 1 << 30
"""Bytes, in addition to those of this process."""

PATIENCE_SECONDS = 120.0
"""Wall-clock time, for a machine that is too busy to give the child its seconds. The verdict is then left open."""

OUT_OF_MEMORY = 3
"""Exit code of the child."""

MAX_LAYERS, MAX_LABELS = 4096, 1 << 16
"""More are certainly a mistake; a configuration names its labels one by one, and its layers as well."""

MAX_USUAL, MAX_USUAL_COUNT = 1 << 24, 1024
"""Sizes, and numbers of parts, of a usual model. A configuration with larger ones is first tried."""

MAX_MIB = {
    "tokenizer.json": 64, "vocab.json": 32, "added_tokens.json": 8, "special_tokens_map.json": 8,
    "tokenizer_config.json": 8, "config.json": 8, "generation_config.json": 8, "adapter_config.json": 8,
}  # fmt: skip
"""Sizes of files that are read as a whole. The largest tokenizer in use has 34 MB."""

TOO_SLOW, TOO_LARGE = "takes too long", "takes too much memory"


def exceeds(call: Callable[[], object]) -> str | None:
    """Call a function in a child process with limits of time and memory.

    Args:
        call: The function. What it returns or raises is of no interest, since the caller will see that here.

    Returns:
        Which limit it exceeds, as the end of a sentence, or None. Only Linux forks safely; elsewhere it is not called.
    """
    if sys.platform != "linux":
        return None
    alive, held = os.pipe()
    with warnings.catch_warnings():
        # Other threads may hold locks, of which a busy child would wait for ever: PATIENCE_SECONDS.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run(call)
    os.close(held)
    try:
        ended = select.poll()
        ended.register(alive)
        if not ended.poll(PATIENCE_SECONDS * 1000):
            return None
        _, status, usage = os.wait4(child, 0)
        child = 0
    finally:
        os.close(alive)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and usage.ru_utime + usage.ru_stime > SECONDS - 1:
        return TOO_SLOW
    # A library in C or Rust that gets no memory aborts, or runs out of its stack.
    return TOO_LARGE if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == OUT_OF_MEMORY else None


def _run(call: Callable[[], object]) -> NoReturn:
    """Call a function under limits, and end this process without a word."""
    import faulthandler
    import resource

    code = 0
    try:
        faulthandler.disable()
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silent, stream)
        limits = {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_CPU: SECONDS,
            resource.RLIMIT_AS: psutil.Process().memory_info().vms + MEMORY,
        }
        for limit, value in limits.items():
            with contextlib.suppress(ValueError, OSError):  # there is a lower one
                resource.setrlimit(limit, (value, value))
        call()
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
        code = OUT_OF_MEMORY if "allocate memory" in str(error) else 0
    finally:
        os._exit(code)


def check_files(folder: Path) -> None:
    """Check the configuration of a model and the sizes of its tokenizer's files before anything is made of them.

    Args:
        folder: A local model, or the folder of the cache that has its config.json.

    Raises:
        ValueError: If they ask for more than a model can have.
    """
    for name, limit in MAX_MIB.items():
        if (folder / name).is_file() and (folder / name).stat().st_size > limit << 20:
            raise ValueError(f"its {name} is larger than {limit} MiB")
    file = folder / "config.json"
    if not file.is_file():
        return
    largest = {"layer": MAX_LAYERS, "label": MAX_LABELS}
    numbers = list(_numbers(json.loads(file.read_text(encoding="utf-8"))))
    for name, value in numbers:
        what = re.search(r"_(layer|label)s?$", name)
        if what and value > largest[what[1]]:
            raise ValueError(f"its config.json asks for {value} {what[1]}s")
    unusual = [
        f"{name}: {value}" for name, value in numbers
        if value > (MAX_USUAL_COUNT if re.search(r"^(num|n)_|layer|expert|block|head|depth|stage", name) else MAX_USUAL)
    ]  # fmt: skip
    if unusual and (fault := exceeds(lambda: _build(folder))):
        raise ValueError(f"to build the model of its config.json ({', '.join(unusual[:3])}) {fault}")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a configuration, each with the key that names it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int):
        yield name, value


def _build(folder: Path) -> None:
    """Build a model without its weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)


_tokenizers: dict[bytes, str | None] = {}


def validate_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what is wrong with a tokenizer that takes too long for a word, or its chat template for a turn, or None.

    The verdict is kept for all tokenizers that do the same to a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    key = pickle.dumps((str(tokenizer.chat_template), parts))
    if key not in _tokenizers:
        fault = exceeds(lambda: tokenizer.decode(tokenizer("Hello world").input_ids))
        if fault is None and tokenizer.chat_template:
            fault = exceeds(lambda: _render(tokenizer))
            fault = fault and f"rendering its chat template {fault}"
        else:
            fault = fault and f"tokenizing a word {fault}"
        _tokenizers[key] = fault
    return _tokenizers[key]


def _render(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render the chat template for some conversations; which of them it refuses does not matter here."""
    contents = ("Hello", "Hello, how may I help you?", "Hello " * 100)
    turns = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), contents, strict=True)
    ]
    system = {"role": "system", "content": "Be brief."}
    for conversation in (turns[:1], turns[:2], turns, [system, *turns]):
        for prompt in (False, True):
            try:
                tokenizer.apply_chat_template(conversation, add_generation_prompt=prompt, tokenize=False)
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001 - templates raise anything
                continue
