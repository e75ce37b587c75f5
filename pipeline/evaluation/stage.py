"""Evaluate one stage: measure everything that its kind of model and the available data allow.

A reward model is measured on pairs, and on the votes of people. A language model is measured by the functions of `TEXT`
and, if it can chat, of `ANSWERS`, one after the other. The opponent, with which later stages are compared, also gets
baselines:

    data            measured                                            with the opponent, its baselines
    text            bits per byte, tasks of lm-eval
    instructions    bits per byte or accuracy of answers, their length
    problems        pass@k, longer problems                             elicited, majority
    prompts         win rates, rewards of environments                  constant; of later stages, KL to the opponent
    fixed prompts   (answers to read)
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jinja2 import TemplateError
from trl import GRPOConfig, SFTConfig

from pipeline import hardware, launch
from pipeline.errors import Problem, UserError, refuse
from pipeline.evaluation import baselines, metrics, win_rate
from pipeline.evaluation.evaluate_yaml import BASE, DEFAULT_LENGTH, VOTES, Settings
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.overlaps import find_overlaps
from pipeline.evaluation.parts import Example, subsample
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
from pipeline.stages import HELD_OUT, STAGES, kind_in_name, stage_order
from pipeline.tools.chat_model import ChatModel
from pipeline.tools.loading import load_toolbox

Opponent = ChatModel | dict[str, win_rate.Answers]
"""The model that others are compared with, or the answers that it gave in its own evaluation, by metric."""

WITHOUT = {
    "text": "bits per byte: not measured, because no text is held out (`text`)",
    "instructions": "answers to instructions: not measured, because no conversations are held out (`instructions`)",
    "problems": "pass@k: not measured, because no problems are held out (`problems`)",
    "prompts": "win rate: not measured, because no prompts are held out (`prompts`)",
}
"""Key of evaluate.yaml -> remark for the report if there are no data of this key."""
UNTRAINED_EXAMPLES = 48
"""Examples of each kind that a model with random weights answers."""


def check_stages(settings: Settings, stages: Mapping[str, str]) -> None:
    """Raise a `UserError` if a run cannot be written to, or if stages are not directories of models.

    `stages` are the stages that options of the command name, by option.
    """
    run = settings.run
    refuse(check_directory(run / "evaluations", "RUN"))
    for option, stage in stages.items():
        # The model that the run starts from may be on the Hub, so it is only checked when it is loaded.
        if settings.model_of(stage) != run / stage:
            continue
        if stage == ".." or Path(stage).name != stage or not holds_model(run / stage):
            models = sorted(path.name for path in run.iterdir() if holds_model(path))
            remedy = f"is not the directory of a model; choose from: {', '.join(models) or 'none, train one first'}"
            raise UserError(Problem(option, stage, remedy))


def evaluate_stage(settings: Settings, stage: str, held_out: HeldOut, folder: Path) -> StageResult:
    """Measure a stage of the run, as a reward model if it is a sequence classifier.

    With the same arguments on the same machine, only the seconds differ between two results.

    Args:
        settings: How the run is measured.
        stage: Name of the stage's directory.
        held_out: The rows that it is measured on.
        folder: Folder of the evaluations, from which the answers of the opponent are read.

    Raises:
        UserError: If a model is broken, or does not fit its tokenizer.
    """
    # Loading counts as part of the time, as it does for the user.
    start = time.perf_counter()
    launch.prepare_process()
    launch.log_threads()
    result = StageResult(stage, seed=settings.requested.seed, left_out=list(held_out.remarks))
    path = settings.model_of(stage)
    with user_error_for("--stage", path):
        is_classifier = is_reward_model(load_config(str(path)))
    if is_classifier:
        _measure_reward_model(result, settings, held_out, path)
    else:
        try:
            _measure_language_model(result, settings, held_out, folder)
        except TemplateError as error:
            remedy = f"its chat template refuses a conversation of the data ({error}); correct one of them"
            raise UserError(Problem("--stage", path, remedy)) from None
    result.overlap = find_overlaps(held_out)
    result.seconds = time.perf_counter() - start
    return result


def _measure_reward_model(result: StageResult, settings: Settings, held_out: HeldOut, path: Path) -> None:
    model, tokenizer = load_model(str(path), "--stage", reward=True, dtype=torch.float32)
    model = model.to(hardware.accelerator() or "cpu").eval()
    rate = partial(score, model, tokenizer)
    if held_out.pairs:
        with RouteCounter(model) as counter:
            measure_pairs(result, rate, held_out.pairs)
        record_load(result, counter)
    else:
        result.left_out.append("reward accuracy: not measured, because no pairs are held out (`pairs`)")
    measure_people(result, rate, settings.run)
    # Only PPO's reward model picks the best: a judge would pick the answers that it then judges.
    best_of = settings.requested.best_of
    if best_of and path in map(Path, settings.facts.reward_models):
        # The pairs above were scored in float32. Choosing the best of many answers needs fewer digits.
        model.to(hardware.fast_dtype())
        judge = _find_judge(result, settings, held_out)
        chats = _load_chats(settings, settings.against, "--against")
        baselines.measure_best_of(result, chats, held_out, as_list(best_of), rate, judge)


@dataclass
class Measurement:
    """A language model that is being measured, and what the functions of `TEXT` and `ANSWERS` share.

    Attributes:
        result: Where they record what they measure.
        settings: How they measure.
        held_out: The rows that they measure on.
        chats: Key of evaluate.yaml -> the model as it answers such data. Only the limits, templates and tools differ.
        judge: Who decides win rates, None if nobody can judge answers to any of the prompts.
        judged: The prompts that the judge can judge.
        opponent: With whom the model is compared, None if there is no opponent yet, or no judge.
        samples: Number of answers sampled to each of these prompts.
        matches: The answers of both, once `measure_prompts` has sampled them.
    """

    result: StageResult
    settings: Settings
    held_out: HeldOut
    chats: dict[str, ChatModel]
    judge: Judge | None = None
    judged: list[Example] = field(default_factory=list)
    opponent: Opponent | None = None
    samples: int = 1
    matches: win_rate.Matches = field(default_factory=dict)

    @property
    def is_opponent(self) -> bool:
        """Whether this is the model that others are compared with. Only its baselines are measured."""
        return self.result.name == self.result.against

    def uncounted(self, key: str) -> ChatModel:
        """Return the model as it answers data of a key, for answers that are not counted by `count_cut_off`."""
        return replace(self.chats[key], counts=Counter())


def _measure_language_model(result: StageResult, settings: Settings, held_out: HeldOut, folder: Path) -> None:
    kind = STAGES.get(kind_in_name(result.name))
    if kind is not None and kind.measured and not kind.trained:
        # With random weights, all answers run into the limit, and none is right.
        held_out = replace(
            held_out,
            instructions=subsample(held_out.instructions, UNTRAINED_EXAMPLES),
            problems=subsample(held_out.problems, UNTRAINED_EXAMPLES),
            longer=subsample(held_out.longer, UNTRAINED_EXAMPLES),
        )
    measurement = Measurement(result, settings, held_out, _load_chats(settings, result.name, "--stage"))
    result.against = settings.against
    for key, remark in WITHOUT.items():
        if not getattr(held_out, key):
            result.left_out.append(remark)

    for measure in TEXT:
        measure(measurement)
    if not measurement.chats["instructions"].tokenizer.chat_template:
        result.left_out.append("answers: not measured, because the tokenizer of this stage has no chat template")
        return
    _find_match(measurement, folder)
    measurement.chats["instructions"].tally.total = _count_answers(measurement)
    for measure in ANSWERS:
        measure(measurement)


def _find_match(measurement: Measurement, folder: Path) -> None:
    """Set the judge of the win rates, the prompts that it can judge, and the opponent."""
    judge = _find_judge(measurement.result, measurement.settings, measurement.held_out)
    if judge is None:
        return
    measurement.judge = judge
    measurement.judged = [row for row in measurement.held_out.prompts if judge.can_judge(row)]
    # People judge each answer, so one is enough.
    measurement.samples = 1 if measurement.settings.requested.judge == VOTES else win_rate.SAMPLES
    if measurement.judged:
        measurement.opponent = _find_opponent(measurement, folder)


def _count_answers(measurement: Measurement) -> int:
    """Return about how many answers the model writes, perhaps as its own opponent; baselines add some more."""
    held_out = measurement.held_out
    greedy = [held_out.instructions or held_out.prompts, held_out.problems, held_out.longer, held_out.fixed_prompts]
    samples = measurement.settings.requested.samples
    sampled = samples * len(metrics.sampled_problems(held_out.problems, samples))
    sides = 0
    if measurement.opponent is not None:
        sides = 2 if measurement.opponent is measurement.chats["prompts"] else 1
    compared = len(measurement.judged) * sides * (measurement.samples + 1)
    return sum(map(len, greedy)) + sampled + compared


def measure_text(measurement: Measurement) -> None:
    """Measure bits per byte of held-out text and, of a model with experts, how evenly it uses them."""
    result = measurement.result
    rows = measurement.held_out.text
    if not rows:
        return
    chat = measurement.chats["instructions"]
    with RouteCounter(chat.model) as counter:
        metrics.measure_bits(result, chat, rows)
    record_load(result, counter)
    if not result.experts:
        return
    # For a few texts, the report shows which expert took which token.
    for row in rows[:3]:
        encoded = chat.tokenizer(row["text"], add_special_tokens=False, split_special_tokens=True)
        ids = encoded["input_ids"][:500]
        pieces = [chat.tokenizer.decode([token]) for token in ids]
        result.experts["documents"].append({"pieces": pieces, "chosen": preferred_experts(chat.model, ids)})


def measure_lm_eval(measurement: Measurement) -> None:
    """Measure the tasks of lm-eval that the settings name."""
    requested = measurement.settings.requested
    if requested.lm_eval_tasks:
        # Imported here, because lm-eval is optional.
        from pipeline.evaluation.harness import measure_tasks

        measure_tasks(measurement.result, measurement.chats["instructions"], requested.lm_eval_tasks, requested.limit)


def measure_instructions(measurement: Measurement) -> None:
    """Measure answers to instructions: their accuracy, or their bits per byte if nothing grades them; their length."""
    result = measurement.result
    held_out = measurement.held_out
    chat = measurement.chats["instructions"]
    ungraded = [row for row in held_out.instructions if not is_gradable(row)]
    if ungraded:
        metrics.measure_bits(result, chat, ungraded, answers_only=True)

    # Likelihoods are computed in float32, answers in the precision that is fast on this machine, from here on.
    chat.model.to(hardware.fast_dtype())
    if held_out.instructions:
        metrics.measure_instructions(result, chat, held_out)
    elif held_out.prompts:
        # Without instructions, the answers to prompts say how long answers are.
        chat = measurement.chats["prompts"]
        completions = metrics.single_answers(chat.sample([row["prompt"] for row in held_out.prompts]))
        metrics.record_ends(result, chat, completions, held_out.prompts, "mean_length")


def measure_problems(measurement: Measurement) -> None:
    """Measure answers to problems, and to problems that are longer than any in training."""
    result = measurement.result
    held_out = measurement.held_out
    chat = measurement.chats["problems"]
    if held_out.problems:
        metrics.measure_problems(result, chat, held_out, measurement.settings.requested.samples)
    if held_out.longer and held_out.graded:
        answers = [completion.text for completion in metrics.single_answers(chat.answer(held_out.longer))]
        metrics.record_greedy(result, "pass@1_longer", answers, held_out.longer, held_out.grader)


def measure_prompts(measurement: Measurement) -> None:
    """Measure answers to prompts: win rates against the opponent, and the rewards that environments give."""
    result = measurement.result
    judge = measurement.judge
    if judge is not None and measurement.opponent is not None:
        rows = measurement.judged
        chat = measurement.chats["prompts"]
        matches = win_rate.answer_both(chat, measurement.opponent, rows, result.seed, measurement.samples)
        win_rate.measure_matches(result, matches, rows, judge)
        result.judge = judge.name
        measurement.matches = matches
    prompts = measurement.held_out.prompts
    if prompts and "environment_reward" not in result.metrics:
        metrics.record_rewards(result, measurement.uncounted("prompts"), prompts)


def count_cut_off(measurement: Measurement) -> None:
    """Record how many answers were cut off at the length limit.

    Answers of baselines and answers to fixed prompts, which follow, are not counted.
    """
    for key, chat in measurement.chats.items():
        if chat.counts["answers"]:
            measurement.result.cut_off[key] = {**chat.counts, "limit": chat.max_new_tokens}


def measure_baselines_of_problems(measurement: Measurement) -> None:
    """Measure what the opponent reaches on problems if it is asked in other ways, or always gives one answer."""
    held_out = measurement.held_out
    if measurement.is_opponent and held_out.problems and held_out.graded:
        elicit = as_list(measurement.settings.requested.elicit or [])
        baselines.measure_reasoning(measurement.result, measurement.uncounted("problems"), held_out, elicit)


def measure_baselines_of_prompts(measurement: Measurement) -> None:
    """Measure how often the opponent wins with a constant text, or how far a later stage has moved away from it."""
    result = measurement.result
    chat = measurement.uncounted("prompts")
    if measurement.is_opponent and measurement.matches and measurement.judge:
        baselines.measure_constant(result, chat, measurement.held_out, measurement.matches, measurement.judge)
    opponent = measurement.opponent
    # Stages are numbered in the order of training. Those before the opponent did not start from it.
    if opponent is not None and stage_order(result.name) > stage_order(result.against):
        if not isinstance(opponent, ChatModel):
            requested = replace(measurement.settings.requested, vllm=False)
            without_vllm = replace(measurement.settings, requested=requested)
            opponent = _load_chats(without_vllm, result.against, "--against")["prompts"]
        win_rate.measure_distance(result, chat, opponent, measurement.judged)


def answer_fixed_prompts(measurement: Measurement) -> None:
    """Let the model answer the prompts that every stage answers, for people to read."""
    prompts = measurement.held_out.fixed_prompts
    # These have no row for an environment, but a model that has learned to call tools does so here, too.
    toolbox = measurement.chats["problems"].toolbox
    if toolbox is not None:
        toolbox = replace(toolbox, environment=None)
    chat = replace(measurement.uncounted("instructions"), toolbox=toolbox)
    completions = metrics.single_answers(chat.answer([{"prompt": prompt} for prompt in prompts]))
    measurement.result.answers = [
        {"prompt": prompt[-1]["content"], "answer": metrics.readable(completion)}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


TEXT = (measure_text, measure_lm_eval)
"""What is measured of every language model, in this order and in float32."""
ANSWERS = (
    measure_instructions,
    measure_problems,
    measure_prompts,
    count_cut_off,
    measure_baselines_of_problems,
    measure_baselines_of_prompts,
    answer_fixed_prompts,
)
"""What is measured of a model that can chat, in this order: the files of an evaluation have their examples in it."""


def _find_judge(result: StageResult, settings: Settings, held_out: HeldOut) -> Judge | None:
    """Return the judge of the win rates; if there is none, record why, and return None."""
    name = settings.requested.judge
    if not held_out.prompts:
        return None
    if name == VOTES:
        return load_votes(settings.run / VOTES / f"{result.name}.jsonl")
    if name and Path(name).is_relative_to(settings.run) and not holds_model(Path(name)):
        result.left_out.append(f"win rate: not measured, because the judge {name} is not trained yet")
        return None
    judge = load_judge(name)
    if not any(map(judge.can_judge, held_out.prompts)):
        remedy = "name a `judge`, or add the columns by which answers are graded"
        result.left_out.append(f"win rate: not measured, because nobody can judge these prompts; {remedy}")
        return None
    return judge


def _find_opponent(measurement: Measurement, folder: Path) -> Opponent | None:
    """Return the opponent in the win rates, or its saved answers; None if there is none yet."""
    result = measurement.result
    settings = measurement.settings
    chat = measurement.chats["prompts"]
    against = result.against
    path = settings.model_of(against)
    if not against or (path == settings.run / against and not holds_model(path)):
        return None
    fingerprint = win_rate.fingerprint(
        path,
        measurement.judged,
        seed=result.seed,
        max_new_tokens=chat.max_new_tokens,
        samples=measurement.samples,
        dtype=hardware.fast_dtype(),
        device=hardware.accelerator(),
        vllm=bool(chat.vllm),
        template=settings.facts.template_for(against, "prompts"),
    )
    if result.name == against:
        result.opponent = fingerprint
        return chat
    # With people as judges, both models answer again, because votes are about the answers that were shown.
    if settings.requested.judge != VOTES and fingerprint:
        answers = _saved_answers(folder / f"{against}.json", fingerprint)
        if answers is not None:
            return answers
    return _load_chats(settings, against, "--against")["prompts"]


def _saved_answers(path: Path, fingerprint: str) -> dict[str, win_rate.Answers] | None:
    """Return the answers that the opponent gave in its own evaluation, by metric.

    Return None if the file is missing or damaged, or if the `fingerprint` of what the answers depend on differs from
    the one in the file.
    """
    notes: list[str] = []
    saved = StageResult.read(path, notes)
    if saved.opponent != fingerprint or notes:
        return None
    answers: dict[str, win_rate.Answers] = {}
    for metric in ("win_rate", "win_rate_greedy"):
        examples = [example for example in saved.examples if example["metric"] == metric]
        # A single answer is only recorded as such.
        answers[metric] = [example.get("opponents") or [example["opponent"]] for example in examples]
        # The file with the examples may be missing.
        if not examples:
            return None
    return answers


def _load_chats(settings: Settings, stage: str, option: Literal["--stage", "--against"]) -> dict[str, ChatModel]:
    """Load the model of a stage, and return a `ChatModel` for each key of data: limits, templates and tools may differ.

    A measured stage is loaded in float32, for likelihoods, and need not have a chat template. The opponent only answers
    prompts, so it is loaded in the precision that is fast on this machine.

    Args:
        settings: How the run is measured.
        stage: Name of the stage's directory.
        option: "--stage" for the stage that is measured, "--against" for the opponent; also named in errors.
    """
    path = str(settings.model_of(stage))
    tokenizer_path = None
    if stage == BASE:
        tokenizer_path = settings.facts.base_tokenizer
    is_opponent = option == "--against"
    can_chat = is_opponent or bool(load_tokenizer(tokenizer_path or path, option).chat_template)
    model, tokenizer = load_model(path, option, dtype=torch.float32, chat=can_chat, tokenizer=tokenizer_path)
    dtype = torch.float32
    if is_opponent:
        dtype = hardware.fast_dtype()
    model = model.to(hardware.accelerator() or "cpu", dtype).eval()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    vllm = None
    if settings.requested.vllm:
        vllm = VLLMSampler(model, tokenizer)
    tally = Tally("answers")
    chats = {}
    for key, limit in _length_limits(settings, positions).items():
        template = settings.facts.template_for(stage, key)
        toolbox = load_toolbox(settings.facts.called.get(key), tokenizer)
        chats[key] = ChatModel(model, tokenizer, limit, vllm, template=template, tally=tally, toolbox=toolbox)
    return chats


def _length_limits(settings: Settings, positions: int | None) -> dict[str, int]:
    """Return the longest answer in tokens for each key of the data that are answered; `positions` is the context.

    Raises:
        UserError: If the settings ask for longer answers than the context.
    """
    answered = [key for key, held_out in HELD_OUT.items() if held_out.length]
    requested = settings.requested.max_new_tokens
    if requested:
        refuse(*check_lengths(positions, max_new_tokens=requested))
        return dict.fromkeys(answered, int(requested))
    # A stage that does not set a length has TRL's default.
    defaults = {"max_length": SFTConfig.max_length, "max_completion_length": GRPOConfig.max_completion_length}
    limits = {}
    for key, length in settings.facts.lengths.items():
        limits[key] = length or defaults[HELD_OUT[key].length]
    # Data that no stage trains on are answered like the first that one trains on.
    default = next(iter(limits.values()), DEFAULT_LENGTH)
    most = positions or 1 << 30
    return {key: min(limits.get(key, default), most) for key in answered}


def record_load(result: StageResult, counter: RouteCounter) -> None:
    """Record how many of the counted tokens each expert took, if the model has experts."""
    if not counter.shares:
        return
    # Each token is counted once for each expert that takes it.
    tokens = round(float(counter.counts[0].sum())) // counter.routers[0].top_k
    result.metrics["expert_load"] = Estimate(least_fair_share(counter.shares), n=tokens)
    layers = []
    for shares in counter.shares:
        layers.append([round(share, 4) for share in shares])
    result.experts = {"layers": layers, "documents": []}
