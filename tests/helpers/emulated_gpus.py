"""A machine with GPUs, as far as `torch.cuda` says so: what is sent to a GPU stays on the CPU."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline import hardware
from pipeline.models.kernels import attention

GROUP_OF_ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
"""What `accelerate launch` sets for a single process."""


class Replica(DistributedDataParallel):
    """A replica that ignores the devices it is given, because its weights really are on the CPU."""

    def __init__(self, module: nn.Module, device_ids: Any = None, output_device: Any = None, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)


@contextmanager
def emulated_gpus(number: int, **environment: str) -> Iterator[None]:
    """Make torch report GPUs, and make this the only real process of the group that `environment` describes.

    Args:
        number: How many GPUs the machine has.
        **environment: Variables of the launcher, by default of a single process.
    """
    init_process_group, to = torch.distributed.init_process_group, nn.Module.to
    variables = {**GROUP_OF_ONE, "MASTER_ADDR": "localhost", "MASTER_PORT": "0", **environment}

    def init_fake_group(*args: Any, **kwargs: Any) -> None:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    def stay(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = args[0] if args else kwargs.get("device")
        return module if str(device).startswith("cuda") else to(module, *args, **kwargs)

    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "device_count": lambda: number,
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_name": lambda *device: "NVIDIA Emulated",
            "is_bf16_supported": lambda *args, **kwargs: True,
            "get_rng_state": lambda *device: torch.empty(0),
            "set_rng_state": lambda *state: None,
        },
        torch.accelerator: {"current_accelerator": lambda *args, **kwargs: torch.device("cuda")},
        torch.distributed: {"init_process_group": init_fake_group},
        nn.Module: {"to": stay},
        nn.parallel: {"DistributedDataParallel": Replica},
        attention: {"validate_varlen": lambda *args: "the GPU is emulated"},
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, variables))
        # A process that is not the first of its group logs warnings only.
        for package in ("pipeline", "recipes"):
            logger = logging.getLogger(package)
            stack.callback(logger.setLevel, logger.level)
        for owner, replaced in answers.items():
            stack.enter_context(patch.multiple(owner, **replaced))
        hardware.accelerator.cache_clear()
        hardware.precision.cache_clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    hardware.accelerator.cache_clear()
    hardware.precision.cache_clear()
