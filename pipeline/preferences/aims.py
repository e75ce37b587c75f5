"""What preference tuning is for: liked answers or, if the grader of the problems preferred them, right ones.

Who preferred an answer follows from the settings of a run's steps:

    3_preferences.yaml    judge: pipeline.rewards.functions:reasoning_gym
    3_reward.yaml         dataset_name: runs/smollm2/3_preferences
    3_ppo.yaml            reward_model_path: runs/smollm2/3_reward
    evaluate.yaml         problems: {grade: reasoning_gym}, which is by default the reward of 4_grpo.yaml

This PPO is trained for right answers. Its main aim is pass@1, and not the win rate, for which nobody can judge.
"""

from collections.abc import Collection, Iterable, Mapping
from os.path import normpath
from pathlib import Path
from typing import Any

from pipeline.files import as_list
from pipeline.rewards.table import GRADES, NO_VERDICT, REWARDS
from pipeline.stages import STAGES
from pipeline.stages.kinds import StageKind

Values = Mapping[str, Any]
StepSettings = tuple[str, Values]
"""The kind of a step, a key of `STAGES`, and its settings."""
BY_DEFAULT = {REWARDS["exact_answer"], REWARDS["math_answer"]}
"""What grades problems if `grade` is not set, as `pipeline.rewards.graders.grade_rows` does."""


def find_aims(stage: StepSettings, steps: Iterable[StepSettings], problems: object) -> tuple[str, ...]:
    """Return the metrics that a stage is trained to improve, the main one first.

    These are the `aims` of its kind. Preference tuning whose only judge is the grader of the problems has pass@1 before
    them.

    Args:
        stage: The stage.
        steps: All steps of its run.
        problems: The recorded `problems` of `evaluate.yaml`; anything but a mapping if none are measured.
    """
    kind, values = stage
    info = STAGES.get(kind, StageKind())
    if "win_rate" not in info.aims or not isinstance(problems, Mapping):
        return info.aims
    if info.data == "prompt":
        judges = _judges_of_rewards(values, list(steps))
    else:
        judges = _judges_of_pairs(values, list(steps))
    if judges and judges <= _graders(problems.get("grade")):
        return ("pass@1", *info.aims)
    return info.aims


def _graders(grade: str | None) -> set[str]:
    """Return the functions that grade problems, as `module:function`; `grade` is that of `evaluate.yaml`."""
    if not grade:
        return BY_DEFAULT
    return {_function(GRADES.get(grade, grade))}


def _function(reward: str) -> str:
    """Return a reward as `module:function`, from its name in `REWARDS` or from `module:function`."""
    return REWARDS.get(reward, reward)


def _judges_of_rewards(values: Values, steps: Collection[StepSettings]) -> set[str]:
    """Return who judges the answers that a stage samples: its reward functions, and the judges of its reward models.

    A function is returned as `module:function`. Anyone else, such as people or the unknown author of pairs, has a name
    that no function has.
    """
    judges = set()
    for reward in as_list(values.get("reward_funcs") or []):
        # The format of an answer says nothing about what it is preferred for.
        if reward not in NO_VERDICT:
            judges.add(_function(str(reward)))
    for model in as_list(values.get("reward_model_path") or []):
        judges |= _judges_of_reward_model(str(model), steps)
    return judges


def _judges_of_reward_model(path: str, steps: Collection[StepSettings]) -> set[str]:
    """Return who judged the pairs of a reward model, or the model itself if the run did not train it."""
    for kind, values in steps:
        if kind == "reward" and _writes(values, path):
            return _judges_of_pairs(values, steps)
    return {path}


def _judges_of_pairs(values: Values, steps: Collection[StepSettings]) -> set[str]:
    """Return who judged the pairs that a stage trains on."""
    judges = set()
    for name in map(str, as_list(values.get("dataset_name") or [])):
        # Pairs that `recipes.data` generates are of a right and a careless solution, whoever judges the others.
        if any(kind == "data" and _writes(made, name) for kind, made in steps):
            continue
        sampled = [made for kind, made in steps if kind == "preferences" and _writes(made, name)]
        if sampled and sampled[0].get("judge") and not sampled[0].get("preferred_column"):
            judges.add(str(sampled[0]["judge"]))
        else:
            # People, the simulated annotators, or whoever wrote a file.
            judges.add(name)
    return judges


def _writes(values: Values, path: str) -> bool:
    """Return whether a step with these settings writes a path: its output directory, or something in it."""
    output = values.get("output_dir")
    return bool(output) and Path(normpath(path)).is_relative_to(normpath(str(output)))
