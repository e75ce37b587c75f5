"""Decide which steps of a run are due, and say why: what has changed in their settings and inputs since they ran.

a step has not run yet                             -> start
a setting that affects what it writes has changed  -> start; or continue, if only the number of steps was raised
a step that it needs is due, or an input changed   -> start
it was interrupted                                 -> resume from its last checkpoint
none of these                                      -> skip
"""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.fields import REMOVED, convert, field_types
from pipeline.config.machine import TRAINING, package_versions
from pipeline.config.weight_fields import can_continue, has_effect, newest_state, number_of
from pipeline.errors import Problem, UserError, refuse
from pipeline.evaluation.evaluate_yaml import DEFAULTS
from pipeline.files import read_json
from pipeline.runner.records import RunRecord, fingerprint, recorded_values
from pipeline.runner.steps import REPORT, Step, find_step

Changes = dict[str, tuple[Any, Any]]
"""Settings that differ, by field, each with its earlier value and its current one."""
LONGEST_VALUES = 60
"""Maximum number of characters of both values of a setting, together, that a reason shows."""


@dataclass(frozen=True)
class Decision:
    """A decision about a step.

    Attributes:
        action: "start" from the beginning, "resume" from what an interrupted step has saved, "continue" from the last
            checkpoint of a finished step with more training steps, or "skip".
        reason: Why, as a phrase: "its configuration changed (seed: 0 -> 1)".
        replaced: Files and folders of earlier output that the step will write again.
        deletes: Whether these are deleted instead of moved to the trash.
    """

    action: Literal["skip", "start", "resume", "continue"]
    reason: str
    replaced: tuple[Path, ...] = ()
    deletes: bool = False


Decisions = list[tuple[Step, Decision]]
"""Steps in the order in which they run, and the decision about each."""


def choose_steps(
    steps: Sequence[Step],
    record: RunRecord,
    start: str | None = None,
    until: str | None = None,
    force: Sequence[str] | None = None,
) -> Decisions:
    """Decide about each step from `start` to `until`, and about the report.

    Args:
        steps: All steps of the run, the last of which is the report.
        record: The record of the run.
        start: The first step (`--from`). It runs even if it has finished, and so do all later ones. None: any step
            may be skipped.
        until: The last step (`--until`), whose evaluation is included. None: the last step of the run.
        force: Steps that start from scratch (`--force`): () means all from `start` on, None means none.

    Raises:
        UserError: If there is no such step, or a step before `start` that is needed is due itself.
    """
    first, last = _chosen_range(steps, start, until)
    chosen = steps[first : last + 1]

    from_start = {step.name for step in steps[first:]}
    forced: set[str] = set()
    if force is not None:
        forced = {find_step(steps, name, "--force").name for name in force} or from_start
    repeated: Collection[str] = ()
    if start is not None:
        repeated = from_start
    decisions = decide(steps, record, repeated, forced)
    _check_earlier_steps(steps[:first], chosen, decisions)

    # The report follows any other step, even with --until, as soon as one stage is measured.
    report = steps[-1]
    choices = [(step, decisions[step.name]) for step in chosen if step is not report]
    is_measured = any(step.kind == "evaluate" and (step in chosen or record.is_finished(step.name)) for step in steps)
    if is_measured:
        has_changed = any(decision.action != "skip" for _, decision in choices)
        if has_changed or REPORT in forced:
            repeated = {REPORT}
        else:
            repeated = ()
        choices.append((report, decide([report], record, repeated)[REPORT]))
    elif not choices:
        raise UserError(Problem("--from", start, "no stage has been evaluated yet; start at an earlier step"))
    return choices


def _chosen_range(steps: Sequence[Step], start: str | None, until: str | None) -> tuple[int, int]:
    """Return the places of the first and the last step that `--from` and `--until` choose, both inclusive."""
    first = 0
    if start is not None:
        first = steps.index(find_step(steps, start, "--from"))
    last = len(steps) - 1
    if until is not None:
        last = steps.index(find_step(steps, until, "--until"))
        # `--until` a stage includes its evaluation.
        if last + 1 < len(steps) and steps[last + 1].name == f"evaluate_{steps[last].output.name}":
            last += 1
    if first > last:
        raise UserError(Problem("--from", start, f"comes after --until {until}"))
    return first, last


def _check_earlier_steps(earlier: Sequence[Step], chosen: Sequence[Step], decisions: Mapping[str, Decision]) -> None:
    """Raise a `UserError` if the chosen steps read the output of a step before `--from` that is due itself."""
    needs: set[str] = set()
    for step in chosen:
        if step.kind not in ("evaluate", "report"):
            needs.update(step.needs)
    problems: list[Problem] = []
    for step in earlier:
        decision = decisions[step.name]
        if step.name in needs and decision.action != "skip":
            remedy = f"is needed first ({decision.reason}); start there, or omit --from"
            problems.append(Problem("--from", step.name, remedy))
    refuse(*problems)


def decide(
    steps: Sequence[Step], record: RunRecord, repeated: Collection[str] = (), forced: Collection[str] = ()
) -> dict[str, Decision]:
    """Decide what to do about each step.

    Args:
        steps: The steps, each after the steps that it needs.
        record: The record of the run.
        repeated: Names of steps that run even if they have finished. One that was interrupted resumes nevertheless.
        forced: Names of steps that start from the beginning in any case, and whose earlier output is deleted.

    Returns:
        The decisions, by the name of the step.
    """
    decisions: dict[str, Decision] = {}
    folders: dict[str, Path] = {}
    for step in steps:
        folders.update(step.data)
    data = {name: fingerprint(folder) for name, folder in folders.items()}
    restarted = {*forced, *filter(record.is_finished, repeated)}
    for step in steps:
        decision = _decide_one(step, record, restarted, decisions, data)
        if step.name in record.steps:
            replaced = _replaced_output(step, decision, record.is_finished(step.name))
            decision = replace(decision, replaced=replaced, deletes=step.name in forced)
        decisions[step.name] = decision
    return decisions


def _replaced_output(step: Step, decision: Decision, is_finished: bool) -> tuple[Path, ...]:
    """Return the earlier output that a step writes again; without what does not exist and empty folders.

    A step that resumes replaces nothing, and one that continues after it has finished replaces its model.
    """
    paths: tuple[Path, ...] = ()
    if decision.action == "start":
        paths = step.leftovers
    elif decision.action == "continue" and is_finished:
        paths = (step.output,)
    return tuple(path for path in paths if path.is_file() or (path.is_dir() and any(path.iterdir())))


def _decide_one(
    step: Step,
    record: RunRecord,
    restarted: Collection[str],
    decisions: Mapping[str, Decision],
    data: Mapping[str, str],
) -> Decision:
    """Decide what to do about a step. The first reason that holds, from top to bottom, is the one that is returned.

    Args:
        step: The step.
        record: The record of the run.
        restarted: Names of the steps that start from the beginning because the user asked for it.
        decisions: What to do about the steps before it.
        data: Fingerprints of the folders of data that people may have edited, by the step that wrote them.
    """
    entry = record.steps.get(step.name)
    if entry is None:
        return Decision("start", "has not run yet")
    if step.name in restarted:
        state = "finished" if record.is_finished(step.name) else "was interrupted"
        return Decision("start", f"{state}, but asked to run again")

    # First, compare its settings.
    effective, harmless = find_changes(step, entry.get("values", {}))
    changes = describe_changes(effective or harmless)
    is_longer = can_continue(step.output, effective, step.values)
    if effective and not is_longer:
        return Decision("start", f"its configuration changed ({changes})")

    # Then compare its inputs: other steps, data that people may have edited, and files outside of the run.
    due = [need for need in step.needs if need in decisions and decisions[need].action != "skip"]
    if due:
        return Decision("start", f"depends on {', '.join(due)}")
    recorded_inputs = {name: identity for name, identity in entry.get("inputs", {}).items() if name in step.needs}
    if recorded_inputs != record.inputs(step):
        return Decision("start", "its inputs have been made again")
    recorded_data = entry.get("data", {})
    edited = [name for name in step.data if recorded_data.get(name, data[name]) != data[name]]
    if edited:
        return Decision("start", f"the data of {', '.join(edited)} were changed")
    files = changed_files(step, entry.get("files"))
    if len(files) == 1:
        return Decision("start", f"{files[0]} has changed")
    if files:
        return Decision("start", f"{', '.join(files)} have changed")

    # Checked last, because more steps from an old checkpoint only make sense if nothing else has changed.
    if is_longer:
        return Decision("continue", f"goes on from its last checkpoint ({changes}), on the schedule of the new total")
    if not record.is_finished(step.name):
        if step.stage.by_people:
            return Decision("resume", "waits for people's votes")
        return Decision("resume", "was interrupted")
    if not step.is_complete:
        return Decision("start", f"finished, but {step.product} is missing or incomplete")
    if step.stage.launched:
        # `python -m recipes.sft`, called by hand, may have trained it further since.
        total = number_of(newest_state(step.output), "max_steps")
        if total > number_of(step.values, "max_steps") > 0:
            reason = f"was continued to {total} steps outside of this run; raise max_steps to keep that"
            return Decision("start", reason)
    reason = "finished"
    if harmless:
        reason += f"; without effect on it: {changes}"
    if step.stage.launched or step.kind == "evaluate":
        reason += _other_versions(entry.get("versions") or {})
    return Decision("skip", reason)


def _other_versions(recorded: Mapping[str, Any]) -> str:
    """Return which libraries have another version now than when a step ran, or "" if none has.

    Example:
        "; made with transformers 5.24.0 (now 5.25.0)"
    """
    differences: list[str] = []
    for name, version in package_versions(*TRAINING).items():
        earlier = str(recorded.get(name, version))
        # Builds of the same release, such as 2.13.0+cpu, are not told apart.
        if earlier.partition("+")[0] != version.partition("+")[0]:
            differences.append(f"{name} {earlier} (now {version})")
    if not differences:
        return ""
    return f"; made with {', '.join(differences)}"


def changed_files(step: Step, recorded: Mapping[str, str] | None) -> list[str]:
    """Return the files outside of the run that a step reads and that have changed since they were recorded.

    Args:
        step: The step.
        recorded: The fingerprint of each file when the step ran. None in a run of an early release, which did not
            record any; then no file counts as changed.
    """
    if recorded is None:
        return []
    present = {str(path): fingerprint(path) for path in step.files}
    changed: list[str] = []
    for path in dict.fromkeys([*recorded, *present]):
        # A later release recorded data but not the files of functions, which are no reason to run the step again.
        # The name of a function is a setting, so a new function is noticed as a change of that.
        is_unrecorded_code = path not in recorded and path.endswith(".py")
        if not is_unrecorded_code and recorded.get(path) != present.get(path):
            changed.append(path)
    return changed


def describe_changes(changes: Changes) -> str:
    """Return the settings that differ as a phrase, the shortest first: "seed: 0 -> 1, problems.prompt_column".

    Both values are shown if they are short. Of two mappings, only the keys that differ are named.
    """
    texts: list[str] = []
    for name, (earlier, present) in changes.items():
        if isinstance(earlier, Mapping) and isinstance(present, Mapping):
            texts += differing_keys(name, earlier, present)
            continue
        has_mapping = isinstance(earlier, Mapping) or isinstance(present, Mapping)
        if has_mapping or len(f"{earlier}{present}") > LONGEST_VALUES:
            texts.append(name)
        else:
            texts.append(f"{name}: {earlier} -> {present}")
    return ", ".join(sorted(texts, key=len))


def differing_keys(name: str, earlier: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ in two mappings, also in inner ones: `name.key`, `name.key.inner`."""
    keys: list[str] = []
    for key in dict.fromkeys([*earlier, *present]):
        earlier_value = earlier.get(key)
        present_value = present.get(key)
        if isinstance(earlier_value, Mapping) and isinstance(present_value, Mapping):
            keys += differing_keys(f"{name}.{key}", earlier_value, present_value)
        elif earlier_value != present_value or (key in earlier) != (key in present):
            keys.append(f"{name}.{key}")
    return keys


def find_changes(step: Step, recorded: Mapping[str, Any]) -> tuple[Changes, Changes]:
    """Return the changes of a step's settings since they were recorded.

    Args:
        step: The step, with its current settings.
        recorded: The settings with which it ran.

    Returns:
        The changes that affect what the step writes, and the changes that do not. An omitted field has its default,
        so adding a field with its default value does not affect it.
    """
    present = recorded_values(step)
    if step.kind == "evaluate":
        # A key that did not exist yet had its default.
        recorded = {**DEFAULTS, **recorded}
    changed: Changes = {}
    for name in {**recorded, **present}:
        if name in REMOVED:
            continue
        earlier_value = recorded.get(name)
        present_value = present.get(name)
        if earlier_value != present_value:
            changed[name] = (earlier_value, present_value)
    effective = dict(changed)
    if step.kind == "evaluate":
        # Reward models only serve to check the judge, and lengths only limit answers if nothing else does.
        effective.pop("reward_models", None)
        if present.get("max_new_tokens"):
            effective.pop("lengths", None)
    elif step.stage.measured:
        effective = {name: pair for name, pair in changed.items() if has_effect(name, present)}
    if effective and step.stage.module:
        effective = _without_defaults(step, effective, recorded, present)
    harmless = {name: pair for name, pair in changed.items() if name not in effective}
    return effective, harmless


def _without_defaults(step: Step, changes: Changes, recorded: Mapping[str, Any], present: Mapping[str, Any]) -> Changes:
    """Return the changes that remain if omitted fields have their defaults, and values the types of their fields.

    Example:
        learning_rate: None -> 5e-5, which is the default    no change
        learning_rate: "1e-4" -> 1e-4                        no change

    Args:
        step: The step, which has a recipe.
        changes: Changes as they are written in the YAML files.
        recorded: All settings with which the step ran.
        present: All its current settings.
    """
    # These imports take seconds.
    from pipeline import hardware
    from pipeline.config.output_directory import RECORD
    from pipeline.models.scratch import ScratchArguments

    if step.stage.file_of:
        # An untrained model reads few fields of the file that it shares with pretraining, such as its sizes.
        read = {item.name for item in dataclasses.fields(ScratchArguments)}
        read |= {"seed", "tokenizer_name_or_path", "output_dir"}
        changes = {name: pair for name, pair in changes.items() if name in read}

    types = step.argument_types
    hints = field_types(*types)
    defaults: dict[str, Any] = {}
    for arguments in types:
        defaults.update({item.name: item.default for item in dataclasses.fields(arguments)})
    # The machine of the earlier run may have had other defaults. Training has recorded them in its output directory.
    earlier_values = {**defaults, **read_json(step.output / RECORD), **recorded}
    machine_defaults = {name: choice.value for name, choice in hardware.training_defaults().items()}
    present_values = {**defaults, **machine_defaults, **present}

    remaining: Changes = {}
    for name, values in changes.items():
        earlier_value = earlier_values.get(name)
        present_value = present_values.get(name)
        if name in hints:
            earlier_value = _converted(earlier_value, hints[name])
            present_value = _converted(present_value, hints[name])
        if earlier_value != present_value:
            remaining[name] = values
    return remaining


def _converted(value: Any, hint: Any) -> Any:
    """Return a value as the type `hint` of its field, or as it is if it has a wrong type, which the step reports."""
    with contextlib.suppress(TypeError):
        return convert(value, hint)
    return value
