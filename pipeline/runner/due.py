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

from pipeline.config.fields import convert, field_types
from pipeline.config.weight_fields import continues, has_effect, newest_state, number_of
from pipeline.evaluation.evaluate_yaml import DEFAULTS
from pipeline.files import read_json
from pipeline.runner.records import RunRecord, fingerprint, recorded_values
from pipeline.runner.steps import Step

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


def decide(
    steps: Sequence[Step], record: RunRecord, again: Collection[str] = (), forced: Collection[str] = ()
) -> dict[str, Decision]:
    """Decide what to do about each step, by name; each comes after the steps that it needs.

    Steps in `again` run even if they have finished. The output of those in `forced` is deleted, and they start again.
    """
    decisions: dict[str, Decision] = {}
    folders = {need: folder for step in steps for need, folder in step.data.items()}
    data = {need: fingerprint(folder) for need, folder in folders.items()}
    for step in steps:
        decision = _decide_one(step, record, {*forced, *filter(record.is_finished, again)}, decisions, data)
        # Earlier output is in the way of a step that starts again. A step that continues keeps its checkpoints.
        if step.name in record.steps:
            written = step.leftovers if decision.action == "start" else ()
            if decision.action == "continue" and record.is_finished(step.name):
                written = (step.output,)
            there = tuple(path for path in written if path.is_file() or (path.is_dir() and any(path.iterdir())))
            decision = replace(decision, replaced=there, deletes=step.name in forced)
        decisions[step.name] = decision
    return decisions


def _decide_one(
    step: Step, record: RunRecord, again: Collection[str], decisions: Mapping[str, Decision], data: Mapping[str, str]
) -> Decision:
    """Return what to do about a step; `decisions` holds what to do about the steps before it."""
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
    if due := [need for need in step.needs if need in decisions and decisions[need].action != "skip"]:
        return Decision("start", f"depends on {', '.join(due)}")
    if {need: run for need, run in entry.get("inputs", {}).items() if need in step.needs} != record.inputs(step):
        return Decision("start", "its inputs have been made again")
    if edited := [need for need in step.data if entry.get("data", {}).get(need, data[need]) != data[need]]:
        return Decision("start", f"the data of {', '.join(edited)} were changed")
    if changed := changed_files(step, entry.get("files")):
        return Decision("start", f"{', '.join(changed)} {'have' if changed[1:] else 'has'} changed")

    # Checked last, because more steps from an old checkpoint only make sense if nothing else has changed.
    if is_longer:
        return Decision("continue", f"goes on from its last checkpoint ({changes}), on the schedule of the new total")
    if not record.is_finished(step.name):
        return Decision("resume", "waits for people's votes" if step.stage.by_people else "was interrupted")
    if not step.is_complete:
        return Decision("start", f"finished, but {step.product} is missing or incomplete")
    # `python -m recipes.sft` may have trained it further since.
    total = number_of(newest_state(step.output), "max_steps") if step.stage.launched else 0
    if total > number_of(step.values, "max_steps") > 0:
        return Decision("start", f"was continued to {total} steps outside of this run; raise max_steps to keep that")
    return Decision("skip", f"finished; without effect on it: {changes}" if harmless else "finished")


def changed_files(step: Step, before: Mapping[str, str] | None) -> list[str]:
    """Return the files outside of the run that a step reads and that changed since `before`, their fingerprints.

    None, from a run of an early release, means that nothing is known. Runs of releases that did not record the files of
    functions are not due because of them; as names of functions are settings, a new one is a change of these.
    """
    if before is None:
        return []
    now = {str(path): fingerprint(path) for path in step.files}
    unrecorded = [path for path in now if path not in before and path.endswith(".py")]
    compared = dict.fromkeys([*before, *now])
    return [path for path in compared if path not in unrecorded and before.get(path) != now.get(path)]


def describe_changes(changes: Changes) -> str:
    """Name the settings that differ, the shortest first, such as "problems.prompt_column, seed: 0 -> 1".

    Values are only shown if they are short: of a mapping, only the keys that differ are named.
    """
    texts = []
    for name, (before, now) in changes.items():
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            texts += differing_keys(name, before, now)
        elif isinstance(before, Mapping) or isinstance(now, Mapping) or len(f"{before}{now}") > LONGEST_VALUES:
            texts.append(name)
        else:
            texts.append(f"{name}: {before} -> {now}")
    return ", ".join(sorted(texts, key=len))


def differing_keys(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ in two mappings, also in inner ones: `name.key`, `name.key.inner`."""
    keys = []
    for key in dict.fromkeys([*before, *now]):
        earlier, present = before.get(key), now.get(key)
        if isinstance(earlier, Mapping) and isinstance(present, Mapping):
            keys += differing_keys(f"{name}.{key}", earlier, present)
        elif earlier != present or (key in before) != (key in now):
            keys.append(f"{name}.{key}")
    return keys


def find_changes(step: Step, before: Mapping[str, Any]) -> tuple[Changes, Changes]:
    """Return the changes of a step's settings since `before`: those that affect its output, and those that do not."""
    now = recorded_values(step)
    if step.kind == "evaluate":
        # A key that did not exist yet had its default.
        before = {**DEFAULTS, **before}
    pairs = {name: (before.get(name), now.get(name)) for name in {**before, **now}}
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    effective = dict(changed)
    if step.kind == "evaluate":
        # Reward models only serve to check the judge, and lengths only limit answers if nothing else does.
        effective.pop("reward_models", None)
        if now.get("max_new_tokens"):
            effective.pop("lengths", None)
    elif step.stage.measured:
        effective = {name: pair for name, pair in changed.items() if has_effect(name, now)}
    if not (effective and step.stage.module):
        return effective, {name: pair for name, pair in changed.items() if name not in effective}

    # An omitted field has its default, so writing down the default is not a change. These imports take seconds.
    from pipeline import hardware
    from pipeline.config.output_directory import RECORD
    from pipeline.models.scratch import ScratchArguments

    types = step.argument_types
    hints = field_types(*types)
    defaults = {item.name: item.default for kind in types for item in dataclasses.fields(kind)}
    machine = {name: choice.value for name, choice in hardware.training_defaults().items()}
    # An untrained model reads few fields of the file that it shares with pretraining, such as its sizes.
    if step.stage.file_of:
        read = {item.name for item in dataclasses.fields(ScratchArguments)}
        read |= {"seed", "tokenizer_name_or_path", "output_dir"}
        effective = {name: pair for name, pair in effective.items() if name in read}

    def resolve(name: str, values: Mapping[str, Any]) -> Any:
        # The step itself reports a value of a wrong type.
        with contextlib.suppress(TypeError):
            return convert(values.get(name), hints[name]) if name in hints else values.get(name)
        return values.get(name)

    # Training records its arguments in its directory.
    earlier = {**defaults, **read_json(step.output / RECORD), **before}
    present = {**defaults, **machine, **now}
    effective = {name: pair for name, pair in effective.items() if resolve(name, earlier) != resolve(name, present)}
    return effective, {name: pair for name, pair in changed.items() if name not in effective}
