"""Which steps of a run are due, and why: what has changed in each one's settings and inputs since it ran.

has not run yet                                      -> start
a setting with an effect on what it writes changed   -> start, or continue if only the number of steps was raised
a step that it needs runs, or its inputs changed     -> start
was interrupted                                      -> resume from its last checkpoint
none of these                                        -> skip
"""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.fields import REMOVED, convert, field_types
from pipeline.config.weight_fields import continues, has_effect, newest_state, number_of
from pipeline.errors import Problem, UserError, refuse
from pipeline.evaluation.evaluate_yaml import DEFAULTS
from pipeline.files import read_json
from pipeline.runner.records import RunRecord, fingerprint, recorded_values
from pipeline.runner.steps import REPORT, Step, find_step

Changes = dict[str, tuple[Any, Any]]
"""Settings that differ, by field: the earlier value and the current one."""
LONGEST_VALUES = 60
"""A reason shows both values of a setting if they have at most this many characters together."""


@dataclass(frozen=True)
class Decision:
    """A decision about a step.

    Attributes:
        action: "resume" continues from what the step has saved, "continue" from its last checkpoint with more steps.
        reason: Why, as a phrase.
        replaced: Earlier output that it will write again; a step that continues keeps its checkpoints.
        deletes: Whether that is deleted instead of moved to the trash.
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
    """Decide about each step from `start` to `until`, and the report.

    Args:
        steps: All steps of the run, the last of which is the report.
        record: The record of the run.
        start: The first step, which runs even if it has finished, as do all after it. Default: the first that is due.
        until: The last step, with its evaluation. Default: the last step of the run.
        force: Steps that start from scratch: () means all from `start` on, None means none.

    Raises:
        UserError: If there is no such step, or a step before `start` that is needed is due itself.
    """
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
    chosen = steps[first : last + 1]

    from_start = {step.name for step in steps[first:]}
    forced: set[str] = set()
    if force is not None:
        forced = {find_step(steps, name, "--force").name for name in force} or from_start
    again: Collection[str] = ()
    if start is not None:
        again = from_start
    decisions = decide(steps, record, again, forced)
    _check_earlier_steps(steps[:first], chosen, decisions)

    # The report follows any other step, even with --until, as soon as one stage is measured.
    report = steps[-1]
    choices = [(step, decisions[step.name]) for step in chosen if step is not report]
    is_measured = any(step.kind == "evaluate" and (step in chosen or record.is_finished(step.name)) for step in steps)
    if is_measured:
        runs_again: Collection[str] = ()
        if REPORT in forced or any(decision.action != "skip" for _, decision in choices):
            runs_again = {REPORT}
        choices.append((report, decide([report], record, runs_again)[REPORT]))
    elif not choices:
        raise UserError(Problem("--from", start, "no stage has been evaluated yet; start at an earlier step"))
    return choices


def _check_earlier_steps(earlier: Sequence[Step], chosen: Sequence[Step], decisions: Mapping[str, Decision]) -> None:
    """Raise a `UserError` if steps before `--from` are due whose output the chosen steps read."""
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
    steps: Sequence[Step], record: RunRecord, again: Collection[str] = (), forced: Collection[str] = ()
) -> dict[str, Decision]:
    """Decide what to do about each step, by name; each comes after the steps that it needs.

    Steps in `again` run even if they have finished. The output of those in `forced` is deleted, and they start again.
    """
    decisions: dict[str, Decision] = {}
    folders: dict[str, Path] = {}
    for step in steps:
        folders.update(step.data)
    data = {need: fingerprint(folder) for need, folder in folders.items()}
    again = {*forced, *filter(record.is_finished, again)}
    for step in steps:
        decision = _decide_one(step, record, again, decisions, data)
        if step.name in record.steps:
            replaced = _output_in_the_way(step, decision, record.is_finished(step.name))
            decision = replace(decision, replaced=replaced, deletes=step.name in forced)
        decisions[step.name] = decision
    return decisions


def _output_in_the_way(step: Step, decision: Decision, is_finished: bool) -> tuple[Path, ...]:
    """Return the earlier output of a step that starts again. A step that continues keeps its checkpoints."""
    paths: tuple[Path, ...] = ()
    if decision.action == "start":
        paths = step.leftovers
    elif decision.action == "continue" and is_finished:
        paths = (step.output,)
    return tuple(path for path in paths if path.is_file() or (path.is_dir() and any(path.iterdir())))


def _decide_one(
    step: Step, record: RunRecord, again: Collection[str], decisions: Mapping[str, Decision], data: Mapping[str, str]
) -> Decision:
    """Return what to do about a step.

    Args:
        step: The step.
        record: The record of the run.
        again: Names of the steps that run even if they have finished.
        decisions: What to do about the steps before it.
        data: Fingerprints of the folders of data that people may have edited, by the step that wrote them.
    """
    entry = record.steps.get(step.name)
    if entry is None:
        return Decision("start", "has not run yet")
    if step.name in again:
        state = "finished" if record.is_finished(step.name) else "was interrupted"
        return Decision("start", f"{state}, but asked to run again")

    # First, compare its settings.
    effective, harmless = find_changes(step, entry.get("values", {}))
    changes = describe_changes(effective or harmless)
    is_longer = continues(step.output, effective, step.values)
    if effective and not is_longer:
        return Decision("start", f"its configuration changed ({changes})")

    # Then compare its inputs: other steps, data that people may have edited, and files outside of the run.
    due = [need for need in step.needs if need in decisions and decisions[need].action != "skip"]
    if due:
        return Decision("start", f"depends on {', '.join(due)}")
    inputs = {need: identity for need, identity in entry.get("inputs", {}).items() if need in step.needs}
    if inputs != record.inputs(step):
        return Decision("start", "its inputs have been made again")
    recorded_data = entry.get("data", {})
    edited = [need for need in step.data if recorded_data.get(need, data[need]) != data[need]]
    if edited:
        return Decision("start", f"the data of {', '.join(edited)} were changed")
    files = changed_files(step, entry.get("files"))
    if files:
        return Decision("start", f"{', '.join(files)} {'has' if len(files) == 1 else 'have'} changed")

    # Checked last, because more steps from an old checkpoint only make sense if nothing else has changed.
    if is_longer:
        return Decision("continue", f"goes on from its last checkpoint ({changes}), on the schedule of the new total")
    if not record.is_finished(step.name):
        return Decision("resume", "waits for people's votes" if step.stage.by_people else "was interrupted")
    if not step.is_complete:
        return Decision("start", f"finished, but {step.product} is missing or incomplete")
    if step.stage.launched:
        # `python -m recipes.sft` may have trained it further since.
        total = number_of(newest_state(step.output), "max_steps")
        if total > number_of(step.values, "max_steps") > 0:
            reason = f"was continued to {total} steps outside of this run; raise max_steps to keep that"
            return Decision("start", reason)
    if harmless:
        return Decision("skip", f"finished; without effect on it: {changes}")
    return Decision("skip", "finished")


def changed_files(step: Step, recorded: Mapping[str, str] | None) -> list[str]:
    """Return the files outside of the run that a step reads and that have changed since they were recorded.

    `recorded` maps each file to its fingerprint; None, from a run of an early release, means that nothing is known.
    Runs of releases that did not record the files of functions are not due because of them. As the names of functions
    are settings, a new one is a change of these.
    """
    if recorded is None:
        return []
    present = {str(path): fingerprint(path) for path in step.files}
    changed: list[str] = []
    for path in dict.fromkeys([*recorded, *present]):
        is_unrecorded_code = path not in recorded and path.endswith(".py")
        if not is_unrecorded_code and recorded.get(path) != present.get(path):
            changed.append(path)
    return changed


def describe_changes(changes: Changes) -> str:
    """Name the settings that differ, the shortest first, such as "problems.prompt_column, seed: 0 -> 1".

    Values are only shown if they are short: of a mapping, only the keys that differ are named.
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

    Returns:
        The changes that affect what the step writes, and those that do not. An omitted field has its default, so
        writing down the default has no effect.
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
    """Return the changes that remain once omitted fields have the defaults of the recipe on both sides."""
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
    for kind in types:
        defaults.update({item.name: item.default for item in dataclasses.fields(kind)})
    machine = {name: choice.value for name, choice in hardware.training_defaults().items()}

    def resolve(name: str, values: Mapping[str, Any]) -> Any:
        if name in hints:
            # The step itself reports a value of a wrong type.
            with contextlib.suppress(TypeError):
                return convert(values.get(name), hints[name])
        return values.get(name)

    # Training records its arguments in its directory.
    earlier_values = {**defaults, **read_json(step.output / RECORD), **recorded}
    present_values = {**defaults, **machine, **present}
    return {
        name: pair for name, pair in changes.items() if resolve(name, earlier_values) != resolve(name, present_values)
    }
