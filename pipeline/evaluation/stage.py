"""Evaluate one stage: measure everything that its kind of model and the available data allow."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from trl import GRPOConfig, SFTConfig

from pipeline import hardware, launch
from pipeline.errors import Problem, UserError, refuse
from pipeline.evaluation import baselines, metrics, win_rate
from pipeline.evaluation.evaluate_yaml import BASE, CALLED, DEFAULT_LENGTH, VOTES, template_arguments
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.overlaps import find_overlaps
from pipeline.evaluation.parts import Rows, subsample
from pipeline.evaluation.results import StageResult
from pipeline.evaluation.reward_model import measure_pairs, measure_people
from pipeline.files import as_list, check_directory, holds_model
from pipeline.models.checks import check_lengths
from pipeline.models.experts import RouteCounter, least_fair_share, preferred_experts
from pipeline.models.loading import is_reward_model, load_config, load_model, load_tokenizer, user_error_for
from pipeline.models.vllm_sampler import VLLMSampler
from pipeline.preferences.judges import Judge, load_judge, score
from pipeline.preferences.people import load_votes
from pipeline.progress import Tally
from pipeline.rewards.grading import is_gradable
from pipeline.stages import HELD_OUT, STAGES
from pipeline.tools.chat_model import ChatModel
from pipeline.tools.loading import load_toolbox

Settings = Mapping[str, Any]

WITHOUT = {
    "text": "bits per byte: not measured, because no text is held out (`text`)",
    "instructions": "answers to instructions: not measured, because no conversations are held out (`instructions`)",
    "problems": "pass@k: not measured, because no problems are held out (`problems`)",
    "prompts": "win rate: not measured, because no prompts are held out (`prompts`)",
}
"""Key of evaluate.yaml -> remark if it names no data."""


def check_stages(run: Path, named: Mapping[str, str], settings: Settings) -> None:
    """Refuse a run that cannot be written to, and stages that are not models, naming the option."""
    refuse(check_directory(run / "evaluations", "RUN"))
    for option, stage in named.items():
        # The model that the run starts from may be on the Hub, so it is only checked when it is loaded.
        is_base = model_of(run, stage, settings) != run / stage
        if not is_base and (stage == ".." or Path(stage).name != stage or not holds_model(run / stage)):
            found = sorted(path.name for path in run.iterdir() if holds_model(path))
            remedy = f"is not the directory of a model; choose from: {', '.join(found) or 'none, train one first'}"
            raise UserError(Problem(option, stage, remedy))


def model_of(run: Path, stage: str, settings: Settings) -> Path:
    """Return the directory of a stage's model; the model `0_base` may be anywhere, or on the Hub."""
    return Path(settings["base"]) if stage == BASE and settings["base"] else run / stage


def evaluate_stage(run: Path, stage: str, held_out: HeldOut, settings: Settings, folder: Path) -> StageResult:
    """Measure RUN/STAGE, as a reward model if it is a sequence classifier.

    With the same arguments on the same machine, only the seconds differ between two results. The `settings` are from
    `evaluate_yaml.complete`, with paths that exist. The answers of the opponent are read from `folder`, to which
    evaluations are written. A UserError is raised if a model is broken, or does not fit its tokenizer.
    """
    # Loading counts as part of the time, as it does for the user.
    began = time.perf_counter()
    launch.prepare_process()
    launch.log_threads()
    result = StageResult(stage, seed=settings["seed"], left_out=list(held_out.remarks))
    path = model_of(run, stage, settings)
    with user_error_for("--stage", path):
        rewards = is_reward_model(load_config(str(path)))
    if rewards:
        model, tokenizer = load_model(str(path), "--stage", reward=True, dtype=torch.float32)
        model = model.to(hardware.accelerator() or "cpu").eval()
        rate = partial(score, model, tokenizer)
        if held_out.pairs:
            with RouteCounter(model) as counter:
                measure_pairs(result, rate, held_out.pairs)
            record_load(result, counter)
        else:
            result.left_out.append("reward accuracy: not measured, because no pairs are held out (`pairs`)")
        measure_people(result, rate, run)
        # Only PPO's reward model picks the best: a judge would pick the answers that it then judges.
        if settings["best_of"] and path in map(Path, settings["reward_models"]):
            # Answers are scored in the precision that is fast on this machine, pairs in float32.
            model.to(hardware.fast_dtype())
            judge = _find_judge(result, run, held_out, settings)
            asked = _load_chats(run, settings["against"], settings, "--against")
            baselines.measure_best_of(result, asked, held_out, as_list(settings["best_of"]), rate, judge)
    else:
        answered, kind = held_out, STAGES.get(stage.partition("_")[2])
        if kind is not None and kind.measured and not kind.trained:
            # With random weights, all answers run into the limit, and none is right.
            keys = ("instructions", "problems", "longer")
            fewer: dict[str, Any] = {key: subsample(getattr(held_out, key), 48) for key in keys}
            answered = replace(held_out, **fewer)
        try:
            _measure_causal_lm(result, run, answered, settings, folder)
        except TemplateError as error:
            remedy = f"its chat template refuses a conversation of the data ({error}); correct one of them"
            raise UserError(Problem("--stage", path, remedy)) from None
    result.overlap = find_overlaps(held_out)
    result.seconds = time.perf_counter() - began
    return result


def _measure_causal_lm(result: StageResult, run: Path, held_out: HeldOut, settings: Settings, folder: Path) -> None:
    chats = _load_chats(run, result.name, settings, "--stage")
    chat = chats["instructions"]
    model, tokenizer = chat.model, chat.tokenizer
    result.against = settings["against"] or ""
    result.left_out += [line for name, line in WITHOUT.items() if not getattr(held_out, name)]

    # Likelihoods are computed in float32, answers in the precision that is fast on this machine.
    if held_out.text:
        with RouteCounter(model) as counter:
            metrics.measure_bits(result, chat, held_out.text)
        record_load(result, counter)
        # For a few texts, the report shows which expert took which token.
        for row in held_out.text[:3] if result.experts else ():
            ids = tokenizer(row["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"][:500]
            pieces = [tokenizer.decode([token]) for token in ids]
            result.experts["documents"].append({"pieces": pieces, "chosen": preferred_experts(model, ids)})
    if settings["lm_eval_tasks"]:
        # Imported here, because lm-eval is optional.
        from pipeline.evaluation.harness import measure_tasks

        measure_tasks(result, chat, settings["lm_eval_tasks"], settings["limit"])
    if not tokenizer.chat_template:
        result.left_out.append("answers: not measured, because the tokenizer of this stage has no chat template")
        return
    judge = _find_judge(result, run, held_out, settings)
    judged = [row for row in held_out.prompts if judge and judge.can_judge(row)]
    # People judge each answer, so one is enough.
    samples = 1 if settings["judge"] == VOTES else win_rate.SAMPLES
    opponent = _find_opponent(result, run, judged, chats["prompts"], settings, folder, samples) if judged else None
    # Approximate number of answers that the model writes, perhaps as its own opponent; baselines add some more.
    greedy = (held_out.instructions or held_out.prompts, held_out.problems, held_out.longer, held_out.fixed_prompts)
    sampled = settings["samples"] * len(metrics.sampled_problems(held_out.problems, settings["samples"]))
    sides = 0 if opponent is None else 2 if opponent is chats["prompts"] else 1
    chat.tally.total = sum(map(len, greedy)) + sampled + len(judged) * sides * (samples + 1)
    if ungraded := [row for row in held_out.instructions if not is_gradable(row)]:
        metrics.measure_bits(result, chat, ungraded, of_answers=True)

    model.to(hardware.fast_dtype())
    if held_out.instructions:
        metrics.measure_instructions(result, chat, held_out)
    elif held_out.prompts:
        completions = [one for (one,) in chats["prompts"].sample([row["prompt"] for row in held_out.prompts])]
        metrics.record_ends(result, chats["prompts"], completions, held_out.prompts, "mean_length")
    if held_out.problems:
        metrics.measure_problems(result, chats["problems"], held_out, settings["samples"])
    if held_out.longer and held_out.graded:
        longer = [answer.text for (answer,) in chats["problems"].answer(held_out.longer)]
        metrics.record_greedy(result, "pass@1_longer", longer, held_out.longer, held_out.grader)
    answers: win_rate.Matches = {}
    if opponent is not None and judge:
        result.judge = judge.name
        answers = win_rate.answer_both(chats["prompts"], opponent, judged, result.seed, samples)
        win_rate.measure_matches(result, answers, judged, judge)
    counted = {key: one for key, one in chats.items() if one.counts["answers"]}
    result.cut_off = {key: {**one.counts, "limit": one.max_new_tokens} for key, one in counted.items()}
    # Answers of baselines and to the fixed prompts do not count as cut off.
    chats = {key: replace(one, counts=Counter()) for key, one in chats.items()}
    if held_out.prompts and "environment_reward" not in result.metrics:
        metrics.record_rewards(result, chats["prompts"], held_out.prompts)
    if result.name == result.against and held_out.problems and held_out.graded:
        baselines.measure_reasoning(result, chats["problems"], held_out, as_list(settings["elicit"] or []))
    if result.name == result.against and answers and judge:
        baselines.measure_constant(result, chats["prompts"], held_out, answers, judge)
    # Stages are numbered in the order of training. Those before the opponent did not start from it.
    if opponent is not None and result.name > result.against:
        if not isinstance(opponent, ChatModel):
            opponent = _load_chats(run, result.against, {**settings, "vllm": False}, "--against")["prompts"]
        win_rate.measure_distance(result, chats["prompts"], opponent, judged)
    # Fixed prompts have no row for an environment, but a model that has learned to call tools does so here, too.
    toolbox = chats["problems"].toolbox
    chat = replace(chats["instructions"], toolbox=toolbox and replace(toolbox, environment=None))
    answered = chat.answer([{"prompt": prompt} for prompt in held_out.fixed_prompts])
    result.answers = [
        {"prompt": prompt[-1]["content"], "answer": metrics.readable(completion)}
        for prompt, (completion,) in zip(held_out.fixed_prompts, answered, strict=True)
    ]


def _find_judge(result: StageResult, run: Path, held_out: HeldOut, settings: Settings) -> Judge | None:
    """Return the judge of the win rates, or None and record why there is none yet."""
    name = settings["judge"]
    if not held_out.prompts:
        return None
    if name == VOTES:
        return load_votes(run / VOTES / f"{result.name}.jsonl")
    if name and Path(name).is_relative_to(run) and not holds_model(Path(name)):
        result.left_out.append(f"win rate: not measured, because the judge {name} is not trained yet")
        return None
    judge = load_judge(name)
    if not any(map(judge.can_judge, held_out.prompts)):
        remedy = "name a `judge`, or add the columns by which answers are graded"
        result.left_out.append(f"win rate: not measured, because nobody can judge these prompts; {remedy}")
        return None
    return judge


def _find_opponent(
    result: StageResult, run: Path, rows: Rows, own: ChatModel, settings: Settings, folder: Path, samples: int
) -> ChatModel | dict[str, win_rate.Answers] | None:
    """Return the opponent in the win rates, or its saved answers; None if there is none yet."""
    against, path = result.against, model_of(run, result.against, settings)
    if not against or (path == run / against and not holds_model(path)):
        return None
    asked: dict[str, Any] = {"seed": result.seed, "max_new_tokens": own.max_new_tokens, "samples": samples}
    asked |= {"dtype": hardware.fast_dtype(), "device": hardware.accelerator(), "vllm": bool(own.vllm)}
    answered = win_rate.fingerprint(path, rows, **asked, template=template_arguments(settings, against, "prompts"))
    if result.name == against:
        result.opponent = answered
        return own
    # Every stage is compared with the answers that were saved in the opponent's evaluation. With people as judges, both
    # models answer again, because votes are about the answers that were shown.
    notes: list[str] = []
    saved = StageResult.read(folder / f"{against}.json", notes)
    if settings["judge"] != VOTES and answered and saved.opponent == answered and not notes:
        answers: dict[str, win_rate.Answers] = {
            name: [one.get("opponents") or [one["opponent"]] for one in saved.examples if one["metric"] == name]
            for name in ("win_rate", "win_rate_greedy")
        }
        # The file with the examples may be missing.
        if all(answers.values()):
            return answers
    return _load_chats(run, against, settings, "--against")["prompts"]


def _load_chats(
    run: Path, stage: str, settings: Settings, option: Literal["--stage", "--against"]
) -> dict[str, ChatModel]:
    """Load the model of a stage, and return a `ChatModel` for each kind of data: limits, and perhaps templates, differ.

    The opponent only answers, in the precision that is fast here. A stage without a chat template is measured on text.
    """
    words = settings["base_tokenizer"] if stage == BASE else None
    path = str(model_of(run, stage, settings))
    is_opponent = option == "--against"
    can_chat = is_opponent or bool(load_tokenizer(words or path, option).chat_template)
    model, tokenizer = load_model(path, option, dtype=torch.float32, chat=can_chat, tokenizer=words)
    model = model.to(hardware.accelerator() or "cpu", hardware.fast_dtype() if is_opponent else torch.float32).eval()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    keys = [key for key, held_out in HELD_OUT.items() if held_out.length]
    if given := settings["max_new_tokens"]:
        refuse(*check_lengths(positions, max_new_tokens=given))
        limits = dict.fromkeys(keys, int(given))
    else:
        # A stage that does not set a length has TRL's default.
        default = {"max_length": SFTConfig.max_length, "max_completion_length": GRPOConfig.max_completion_length}
        found = {key: length or default[HELD_OUT[key].length] for key, length in settings["lengths"].items()}
        other = next(iter(found.values()), DEFAULT_LENGTH)
        limits = {key: min(found.get(key, other), positions or 1 << 30) for key in keys}

    vllm = VLLMSampler(model, tokenizer) if settings["vllm"] else None
    tally, chats = Tally("answers"), {}
    for key, limit in limits.items():
        template = template_arguments(settings, stage, key)
        toolbox = load_toolbox((settings[CALLED] or {}).get(key), tokenizer)
        chats[key] = ChatModel(model, tokenizer, limit, vllm, template=template, tally=tally, toolbox=toolbox)
    return chats


def record_load(result: StageResult, counter: RouteCounter) -> None:
    """Record how many of the counted tokens each expert took, if the model has experts."""
    if not counter.shares:
        return
    # Each token is counted once for each expert that takes it.
    tokens = round(float(counter.counts[0].sum())) // counter.routers[0].top_k
    result.metrics["expert_load"] = Estimate(least_fair_share(counter.shares), n=tokens)
    result.experts = {"layers": [[round(share, 4) for share in layer] for layer in counter.shares], "documents": []}
