"""Everything that is measured on one stage: all metrics that its kind of model and the data at hand allow."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline import hardware, launch
from pipeline.errors import Problem, UserError
from pipeline.evaluation import measurements, reward_model
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.measurements import Speaker
from pipeline.evaluation.results import StageResult
from pipeline.models.loading import is_reward_model, load_config, load_model, user_error_for


def check_stage(run: Path, stage: str, option: str = "--stage") -> None:
    """Raise `UserError` about `option` unless RUN/STAGE holds a model."""
    if not run.is_dir():
        raise UserError(Problem("RUN", run, "there is no such directory: give that of a run"))
    if Path(stage).name != stage or not holds_model(run / stage):
        found = sorted(path.name for path in run.iterdir() if holds_model(path))
        remedy = f"holds no model; choose from: {', '.join(found) or 'none, train one first'}"
        raise UserError(Problem(option, stage, remedy))


def evaluate_stage(
    run: Path,
    stage: str,
    held_out: HeldOut,
    *,
    against: str = "2_sft",
    samples: int = 8,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> StageResult:
    """Measure RUN/STAGE.

    Args:
        run: the run directory.
        stage: its model's directory in `run`. A sequence classifier is measured as a reward model.
        held_out: what it is measured on.
        against: the stage that it is compared with in `win_rate`, if there is one.
        samples: answers sampled to each problem.
        max_new_tokens: longest answer.
        seed: of the sampled answers and the intervals.

    Returns:
        The metrics, the value of every example, answers and traces. The same arguments on the same machine
        give the same result, the seconds apart.
    """
    began = time.perf_counter()
    launch.prepare_cpu()
    result = StageResult(stage)
    with user_error_for("--stage", run / stage):
        rewards = is_reward_model(load_config(str(run / stage)))
    if rewards:
        if held_out.pairs:
            model, tokenizer = load_model(str(run / stage), "--stage", reward=True, dtype=torch.float32)
            reward_model.measure(result, _place(model), tokenizer, held_out.pairs, seed)
    else:
        speaker = load_speaker(run / stage, max_new_tokens)
        if held_out.texts:
            measurements.texts(result, speaker, held_out.texts, seed)
        speaker.model.to(generation_dtype())
        if held_out.instructions:
            measurements.instructions(result, speaker, held_out.instructions, seed)
        if held_out.problems:
            measurements.problems(result, speaker, held_out.problems, samples, seed)
        if held_out.prompts and holds_model(run / against):
            opponent = load_speaker(run / against, max_new_tokens)
            opponent.model.to(generation_dtype())
            measurements.match(result, speaker, opponent, held_out.prompts, seed)
        measurements.fixed_prompts(result, speaker)
    result.seconds = time.perf_counter() - began
    return result


def holds_model(path: Path) -> bool:
    """Whether a model, or a LoRA adapter that knows its base, is in the directory `path`."""
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def load_speaker(path: Path, max_new_tokens: int) -> Speaker:
    """The language model in `path`, in float32, on the accelerator if there is one."""
    model, tokenizer = load_model(str(path), "--stage", dtype=torch.float32)
    return Speaker(_place(model), tokenizer, max_new_tokens)


def generation_dtype() -> torch.dtype:
    """bfloat16 where that is fast. Losses, of which small differences matter, are measured in float32."""
    return torch.bfloat16 if hardware.precision().value == "bf16" else torch.float32


def _place(model: PreTrainedModel) -> PreTrainedModel:
    return model.to(hardware.accelerator() or "cpu").eval()
