"""`trainer` in a YAML file: a subclass of the stage's trainer, which a user wrote."""

import inspect
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest

from pipeline.errors import UserError
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer
from pipeline.stages import STAGES
from pipeline.training.custom_trainer import load_trainer

CODE = """
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer

class MyPPO(PPOTrainer):
    pass

class MyOtherPPO(MyPPO):
    pass

class MyGRPO(GRPOTrainer):
    pass

def train():
    pass
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_trainers.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(import_module("sys").modules, "my_trainers", raising=False)


def test_a_subclass_of_a_subclass_trains() -> None:
    assert load_trainer("my_trainers:MyPPO", PPOTrainer).__name__ == "MyPPO"
    assert load_trainer("my_trainers:MyOtherPPO", PPOTrainer).__name__ == "MyOtherPPO"
    assert load_trainer("my_trainers:MyGRPO", GRPOTrainer).__name__ == "MyGRPO"
    assert load_trainer(None, PPOTrainer) is PPOTrainer


@pytest.mark.parametrize(
    ("name", "stage_trainer", "reported"),
    [
        ("my_trainers:MyGRPO", PPOTrainer, "must be a subclass of pipeline.rl.ppo.PPOTrainer"),
        # PPO's trainer is a subclass of GRPO's, but is built from other arguments.
        ("my_trainers:MyPPO", GRPOTrainer, "must be a subclass of pipeline.rl.grpo.GRPOTrainer"),
        ("trl:GRPOTrainer", GRPOTrainer, "must be a subclass of pipeline.rl.grpo.GRPOTrainer"),
        ("my_trainers:train", PPOTrainer, "must be a subclass of"),
        ("my_trainers:MyPP0", PPOTrainer, "did you mean my_trainers:MyPPO"),
        ("absent_trainers:MyPPO", PPOTrainer, "cannot import absent_trainers"),
        ("MyPPO", PPOTrainer, "write it as package.module:Class"),
    ],
)
def test_anything_else_is_refused(name: str, stage_trainer: type, reported: str) -> None:
    with pytest.raises(UserError, match=reported):
        load_trainer(name, stage_trainer)


@pytest.mark.parametrize("kind", [name for name, stage in STAGES.items() if stage.trainer])
def test_the_trainer_of_a_stage_is_the_one_that_its_recipe_builds(kind: str) -> None:
    stage = STAGES[kind]
    trainer = resolve_name(stage.trainer)
    source = inspect.getsource(import_module(stage.module))
    assert f"load_trainer(trainer_args.trainer, {trainer.__name__})" in source
    assert f"from {trainer.__module__} import" in source


def test_every_stage_that_trains_a_model_has_a_trainer() -> None:
    for kind, stage in STAGES.items():
        trains = stage.launched and stage.measured
        assert bool(stage.trainer) == trains, kind
