"""Which settings of a training run have an effect on its weights, and whether it can continue with more steps.

A run whose settings changed only in fields without an effect is resumed, or need not run again.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.files import read_json

WITHOUT_EFFECT = re.compile(
    r"(logging|log|save|eval|hub|push|trackio|ddp)_\w+|report_to|run_name|project|disable_tqdm|do_eval|local_rank|debug|"
    r"(gradient|activation)_checkpointing\w*|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)|"
    r"per_device_eval_batch_size|max_eval_samples|dataset_test_split|metric_for_best_model|greater_is_better|"
    r"prediction_loss_only|include_for_metrics|include_num_input_tokens_seen|batch_eval_metrics|skip_memory_metrics|"
    r"num_completions_to_print|num_generations_eval|dataset_num_proc|resume_from_checkpoint|torch_empty_cache_steps"
)
"""Names of fields without an effect on the weights: what is reported, saved, measured or pushed, and when."""

BY_EVALUATION = re.compile(
    r"eval_\w+|(save|logging)_(steps|strategy)|max_eval_samples|dataset_test_split|metric_for_best_model|"
    r"greater_is_better|prediction_loss_only"
)
"""Names in `WITHOUT_EFFECT` of fields that have an effect if evaluations choose the weights (`load_best_model_at_end`).
`logging_steps` is the default of `eval_steps`, and only a checkpoint that was saved can be the best one."""


def has_effect(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a field of a training run has an effect on the weights.

    A field that is not known here has one: then a change starts a new run instead of resuming the old one.

    Args:
        name: The field.
        values: All settings of the run, by field.
    """
    if name == "num_train_epochs":
        return number_of(values, "max_steps") <= 0
    # Pretraining builds a new model, and does not load one.
    pretrains = "model_name_or_path" not in values
    streams = values.get("dataset_streaming")
    # The workers of a stream take turns, so their number changes the order of the rows.
    if name == "dataloader_num_workers" and streams and not pretrains:
        return True
    # `dataset_num_proc` processes pack a part of the data each, so their number changes the rows.
    if name == "dataset_num_proc" and not streams and (values.get("packing") or pretrains):
        return True
    if not WITHOUT_EFFECT.fullmatch(name):
        return True
    # Evaluations choose the weights, or the learning rate of these schedules.
    follows_evaluations = values.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    if values.get("load_best_model_at_end") or follows_evaluations:
        return BY_EVALUATION.fullmatch(name) is not None
    return False


def can_continue(output_dir: Path, changed: Collection[str], values: Mapping[str, Any]) -> bool:
    """Return whether a finished or killed run can be made longer, starting from its last checkpoint.

    Args:
        output_dir: Directory of the run.
        changed: Fields that changed since the run and have an effect on the weights. Only the number of steps or epochs
            may have changed. With none, the run can be resumed, but not made longer: False is returned.
        values: The new settings, by field. They must not make the run shorter than it was meant to be.
    """
    if not changed or not {"max_steps", "num_train_epochs"}.issuperset(changed):
        return False
    if values.get("save_only_model"):
        # Its checkpoints have no optimizer states.
        return False
    state = newest_state(output_dir)
    steps = number_of(values, "max_steps")
    if steps > 0:
        return 0 < number_of(state, "max_steps") <= steps
    return 0 < number_of(state, "num_train_epochs") < number_of(values, "num_train_epochs")


def number_of(values: Mapping[str, Any], name: str) -> float:
    """Return the number that a field of settings or of a trainer's state has.

    It is 0 if the field is missing or not a number. Another check reports that.
    """
    value = values.get(name)
    if isinstance(value, int | float):
        return value
    return 0


def newest_state(output_dir: Path) -> dict[str, Any]:
    """Return the trainer's state from the latest readable checkpoint, or {} if there is none."""
    # The state of a damaged checkpoint, which training skips with a warning, is read as {}, and counts as step 0.
    states = map(read_json, output_dir.glob("checkpoint-*/trainer_state.json"))
    return max(states, key=lambda state: number_of(state, "global_step"), default={})
