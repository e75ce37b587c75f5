"""Evaluate one stage: measure all that its kind of model and the data at hand allow."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline import hardware, launch
from pipeline.errors import Problem, UserError
from pipeline.evaluation import baselines, matches, metrics
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.opponent import fingerprint, saved_answers
from pipeline.evaluation.results import StageResult
from pipeline.evaluation.reward_model import measure_pairs
from pipeline.files import check_directory
from pipeline.models.checks import check_lengths
from pipeline.models.loading import is_reward_model, load_config, load_model, user_error_for


def check_run(run: Path) -> None:
    """Check, before anything is loaded, that RUN exists and RUN/evaluations can be written.

    Raises:
        UserError: If RUN does not exist, or the evaluations cannot be written.
    """
    if not run.is_dir():
        raise UserError(Problem("RUN", run, "does not exist or is not a directory; give the directory of a run"))
    if problem := check_directory(run / "evaluations", "RUN"):
        raise UserError(problem)


def check_stage(run: Path, stage: str, option: str) -> None:
    """Check that RUN/STAGE, which `option` names, contains a model.

    Raises:
        UserError: If it does not.
    """
    if stage == ".." or Path(stage).name != stage or not holds_model(run / stage):
        found = sorted(path.name for path in run.iterdir() if holds_model(path))
        remedy = f"is not the directory of a model; choose from: {', '.join(found) or 'none, train one first'}"
        raise UserError(Problem(option, stage, remedy))


def check_opponent(run: Path, stage: str) -> None:
    """Check that RUN/STAGE, if it contains a model, can be an opponent in the win rate.

    Raises:
        UserError: If it is a reward model.
    """
    with user_error_for("--against", stage):
        rewards = holds_model(run / stage) and is_reward_model(load_config(str(run / stage)))
    if rewards:
        raise UserError(Problem("--against", stage, "is a reward model, which does not write answers; choose another"))


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
    """Measure RUN/STAGE. With the same arguments on the same machine, only the seconds differ between two results.

    Args:
        run: The run directory.
        stage: Directory of the model in `run`. A sequence classifier is measured as a reward model.
        held_out: What it is measured on.
        against: The stage that it is compared with in `win_rate`, if it exists. That stage gets the baselines, too.
        samples: Answers sampled to each problem.
        max_new_tokens: Length limit of an answer.
        seed: Seed of the sampled answers and of the intervals.

    Raises:
        UserError: If a model is broken, or does not fit its tokenizer.
    """
    began = time.perf_counter()
    launch.prepare_process()
    launch.log_threads()
    result = StageResult(stage)
    with user_error_for("--stage", run / stage):
        rewards = is_reward_model(load_config(str(run / stage)))
    if rewards:
        model, tokenizer = load_model(str(run / stage), "--stage", reward=True, dtype=torch.float32)
        if held_out.pairs:
            measure_pairs(result, _place(model), tokenizer, held_out.pairs, seed)
    else:
        chat = load_chat_model(run / stage, "--stage", max_new_tokens)
        opponent: metrics.ChatModel | dict[str, list[str]] | None = None
        if held_out.prompts and holds_model(run / against):
            settings = {"seed": seed, "max_new_tokens": max_new_tokens, "dtype": hardware.sampling_dtype()}
            answered = fingerprint(run / against, held_out.prompts, device=hardware.accelerator(), **settings)
            if stage == against:
                opponent, result.opponent = chat, answered
            elif (opponent := saved_answers(run, against, answered)) is None:
                opponent = load_chat_model(run / against, "--against", max_new_tokens)
                opponent.model.to(hardware.sampling_dtype())
        if held_out.texts:
            metrics.measure_texts(result, chat, held_out.texts, seed)
        chat.model.to(hardware.sampling_dtype())
        if held_out.instructions:
            metrics.measure_instructions(result, chat, held_out.instructions, seed)
        if held_out.problems:
            metrics.measure_problems(result, chat, held_out.problems, samples, seed)
        if held_out.longer:
            metrics.measure_longer(result, chat, held_out.longer)
        answers: matches.Matches = {}
        if opponent is not None:
            answers = matches.answer_both(chat, opponent, held_out.prompts, seed)
            matches.measure_matches(result, answers, held_out.prompts, seed)
        if stage == against:
            baselines.measure_baselines(result, chat, held_out, answers, seed)
        metrics.answer_fixed_prompts(result, chat)
    result.seconds = time.perf_counter() - began
    return result


def holds_model(path: Path) -> bool:
    """Return whether the directory `path` contains a model, or a LoRA adapter that names its base model."""
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def load_chat_model(path: Path, option: str, max_new_tokens: int) -> metrics.ChatModel:
    """Load the language model in `path`, which `option` names, in float32 on the accelerator if there is one."""
    model, tokenizer = load_model(str(path), option, dtype=torch.float32)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if problems := check_lengths(positions, max_new_tokens=max_new_tokens):
        raise UserError(*(replace(problem, field=f"--{problem.field}") for problem in problems))
    return metrics.ChatModel(_place(model), tokenizer, max_new_tokens)


def _place(model: PreTrainedModel) -> PreTrainedModel:
    return model.to(hardware.accelerator() or "cpu").eval()
