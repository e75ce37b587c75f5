"""The trainer that a YAML file names instead of the stage's: a subclass of it, which a researcher wrote.

    trainer: my_ppo:EntropyPPO      in 3_ppo.yaml: the class EntropyPPO of my_ppo.py, a subclass of PPOTrainer

Only the commands that train import it: those that read a finished run, such as `chat`, need the model alone.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.config.named_code import find_named
from pipeline.data.arguments import option
from pipeline.errors import Problem, UserError


@dataclass
class TrainerArguments:
    """The class that trains."""

    trainer: str | None = option(None, "Subclass of the stage's trainer that trains: package.module:Class.")


def load_trainer(name: str | None, stage_trainer: Any) -> Any:
    """Return the class that trains: the one that `name` refers to, or the stage's trainer if `name` is None.

    Args:
        name: `package.module:Class`.
        stage_trainer: The trainer that the stage's recipe builds by default.

    Raises:
        UserError: If the class cannot be imported, or is not a subclass of the stage's trainer.
    """
    if name is None:
        return stage_trainer
    if ":" not in name:
        raise UserError(Problem("trainer", name, "write it as package.module:Class"))
    trainer = find_named(name, "trainer", {})
    if _trainer_of_this_package(trainer) is not stage_trainer:
        parent = f"{stage_trainer.__module__}.{stage_trainer.__name__}"
        raise UserError(Problem("trainer", name, f"must be a subclass of {parent}, which trains this stage"))
    return trainer


def _trainer_of_this_package(trainer: Any) -> type | None:
    """Return the nearest class that a class of a user inherits from this package, or None.

    The nearest one counts because PPO's trainer is itself a subclass of GRPO's, but needs other arguments.
    """
    for parent in getattr(trainer, "__mro__", ()):
        if parent.__module__.partition(".")[0] == "pipeline":
            return parent
    return None
