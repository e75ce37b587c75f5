"""All kinds of steps, in one table: everything that the runner, the report, the page and the Hub need to know.

A recipe folder holds one file for each step, named `<number>_<kind>.yaml`. `STAGES` has an entry for each kind:

    3_ppo.yaml  ->  STAGES["ppo"]  ->  recipes/ppo.py, "Preference tuning (PPO)", win_rate, two steps of --smoke, ...

To add a kind, write its recipe and its entry here. Recipes are only imported when they are used, so that every module
can import this one. The signature of a recipe's `main` names its argument dataclasses.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from pipeline.stages.kinds import Baseline, Box, Card, HeldOutData, LoggedChart, StageKind

OPPONENT = "sft"
"""The kind of stage that others are compared with."""

HELD_OUT = {
    "text": HeldOutData("text", "pretrain"),
    "instructions": HeldOutData("conversation", "sft", length="max_length"),
    "problems": HeldOutData("prompt", "reasoning", length="max_completion_length"),
    "prompts": HeldOutData("prompt", "preferences", length="max_completion_length"),
    "pairs": HeldOutData("preference"),
}
"""The data that stages are measured on, by the keys of `evaluate.yaml`."""

BASELINES = {
    "elicited": Baseline("{against}, prompted with", "`{against}`, its answer begun with “{text}”"),
    "constant": Baseline("{against}, always with", "`{against}`, with a fixed text before or after its answer"),
    "majority": Baseline(
        "most frequent training answer of each kind",
        "the most frequent answer of the training data to each kind of problem",
    ),
    "untouched": Baseline("environment without calls", "the environment, if nothing is called in it"),
    "best_of": Baseline(
        "{against}, the answer that the reward model likes best, of",
        "the answer that the reward model scores highest, of {text} that `{against}` samples",
        is_bar=False,
    ),
}

LOSS = (("training", "loss"), ("validation", "eval_loss"))
"""Lines of a chart of the loss, as in `LoggedChart.lines`."""

ENTROPY = LoggedChart("Entropy, nats per token", (("entropy", "entropy"),))

SMOKE = "smoke: two steps of each stage; the figures mean nothing"
"""What the terminal, the report and the page say about a run with `--smoke`."""

# Settings that `--smoke` overrides. Two steps on few rows take seconds, even with a recipe for a large model.
SMOKE_TRAINING: Mapping[str, Any] = {
    "max_steps": 2, "warmup_steps": 1, "max_train_samples": 64, "max_eval_samples": 16,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "logging_steps": 1, "torch_compile": False, "report_to": "none", "push_to_hub": False,
}  # fmt: skip
# Each process samples four completions in a step.
SMOKE_ROLLOUTS: Mapping[str, Any] = {**SMOKE_TRAINING, "per_device_train_batch_size": 4, "max_completion_length": 16}
SMOKE_MODEL: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMOKE_SAMPLING: Mapping[str, Any] = {"max_prompts": 64, "max_eval_prompts": 32, "max_new_tokens": 16}
# Steps that measure a stage have no kind.
SMOKE_EVALUATION: Mapping[str, Any] = {"limit": 8, "max_new_tokens": 16}


def _training(data: Any, smoke: Mapping[str, Any] = SMOKE_TRAINING, **about: Any) -> StageKind:
    """Return a kind of step that trains a model under `accelerate launch`, after which the model is measured.

    Args:
        data: Content of its rows, as in `StageKind.data`.
        smoke: Settings that `--smoke` overrides.
        **about: The other attributes of `StageKind`.
    """
    length = {"text": "block_size", "prompt": "max_completion_length"}.get(data, "max_length")
    return StageKind(launched=True, measured=True, data=data, length=length, smoke=smoke, **about)


def _preference_tuning(method: str, how: str, limit: str, **about: Any) -> StageKind:
    """Return a kind of step that trains a model to answer as people prefer.

    Args:
        method: The algorithm, such as "PPO"; its recipe is `recipes/ppo.py`.
        how: How the model was trained, for its card.
        limit: What the model is not good at, for its card.
        **about: The other attributes of `StageKind`.
    """
    kind = method.lower()
    return _training(
        name="Preference tuning",
        method=method,
        module=f"recipes.{kind}",
        aims=("win_rate", "win_rate_greedy", "environment_reward"),
        card=Card("A chat model that was tuned to answer as people prefer.", how, limit, ("trl", kind, "rlhf")),
        **about,
    )


STAGES: dict[str, StageKind] = {
    "data": StageKind(
        module="recipes.data",
        seconds=4,
        editable=True,
        trained=False,
        smoke={"size_mb": 0.3, "sft_rows": 400, "preference_rows": 64, "reasoning_rows": 128, "miniature": True},
    ),
    "tokenizer": StageKind(
        module="recipes.tokenizer",
        seconds=2,
        seeded=False,
        trained=False,
        smoke={"vocab_size": 512, "max_train_samples": 2000},
    ),
    "random": StageKind(
        name="Random weights",
        module="recipes.untrained",
        seconds=1,
        measured=True,
        trained=False,
        chats=False,
        file_of="pretrain",
        directory="0_random",
        smoke=SMOKE_MODEL,
        box=Box(
            about="A new model: numbers drawn at random. It has read nothing, and writes gibberish.",
            goes_in="nothing",
            trains="nothing yet",
            drawing="noise",
        ),
        card=Card(
            summary="A model that has learned nothing yet. It is what pretraining starts from, and what the other "
            "stages of the run are compared with.",
            how="It was not: these are the random weights that pretraining starts from.",
            limit="It writes gibberish.",
        ),
    ),
    # Not a step: if the first stage starts from a model from the Hub, that is measured as 0_base.
    "base": StageKind(name="The model to start from", trained=False, box_of="random"),
    "pretrain": _training(
        name="Pretraining",
        module="recipes.pretrain",
        trainer="pipeline.training.pretraining:PretrainTrainer",
        seconds=77,
        chats=False,
        from_scratch=True,
        data="text",
        held_out="text",
        aims=("bits_per_byte",),
        remedy="train longer (max_steps), on more text, or raise learning_rate",
        # With fewer rows, the held-out texts would not fill a block.
        smoke={**SMOKE_MODEL, **SMOKE_TRAINING, "max_train_samples": 512, "block_size": 256},
        charts=(
            LoggedChart("Loss, nats per token", LOSS),
            LoggedChart("Bits per byte, validation", (("validation", "eval_bits_per_byte"),)),
        ),
        box=Box(
            about="It reads a lot of text and learns to guess the next token: a word or a piece of one. Now it "
            "knows language, but only continues what it is given.",
            goes_in="plain text",
            trains="its wrong guesses of the next token",
            drawing="next token",
            place="curves",
        ),
        card=Card(
            summary="A base model, which continues text. It has not been tuned to follow instructions.",
            how="By predicting the next token of documents, with `transformers.Trainer`.",
            limit="It continues a text and does not answer; for answers, take a later stage.",
        ),
    ),
    "sft": _training(
        name="Instruction tuning",
        module="recipes.sft",
        trainer="pipeline.training.fine_tuning:SFTTrainer",
        seconds=29,
        data="conversation",
        held_out="instructions",
        aims=("instruction_accuracy", "answer_bits_per_byte", "stop_rate"),
        remedy="train longer (max_steps, num_train_epochs), on more conversations, or raise learning_rate",
        charts=(
            LoggedChart("Loss, nats per token", LOSS, note="Answers only."),
            LoggedChart(
                "Token accuracy", (("training", "mean_token_accuracy"), ("validation", "eval_mean_token_accuracy"))
            ),
        ),
        box=Box(
            about="It reads questions with good answers and learns to answer, and to stop.",
            goes_in="questions with answers",
            trains="the difference from the given answer",
            drawing="answer",
        ),
        card=Card(
            summary="A chat model, which answers questions and follows instructions.",
            how="By predicting the answers of example conversations, with `trl.SFTTrainer`.",
            limit="It imitates the answers that it was shown, with their mistakes, and states what it does not know as "
            "confidently as what it does.",
            tags=("trl", "sft"),
        ),
    ),
    "preferences": StageKind(
        name="Preferences",
        module="recipes.preferences",
        seconds=17,
        launched=True,
        editable=True,
        trained=False,
        samples=True,
        check="pipeline.preferences.collect:check_judge",
        data="prompt",
        held_out="prompts",
        smoke=SMOKE_SAMPLING,
    ),
    "votes": StageKind(
        module="recipes.votes",
        seconds=1,
        editable=True,
        trained=False,
        by_people=True,
        directory="votes",
        smoke={**SMOKE_SAMPLING, "min_votes": 1, "simulated_votes": True},
    ),
    "reward": _training(
        name="Reward model",
        module="recipes.reward",
        trainer="pipeline.training.fine_tuning:RewardTrainer",
        seconds=19,
        generates=False,
        data="preference",
        held_out="pairs",
        aims=("reward_accuracy", "reward_accuracy_noise_free"),
        remedy="PPO would optimise noise: give it more pairs, or train it longer (num_train_epochs, learning_rate)",
        charts=(
            LoggedChart(
                "Reward-model accuracy",
                (("training", "accuracy"), ("validation", "eval_accuracy")),
                note="Share of pairs whose preferred answer scores higher; 0.5 is chance.",
            ),
            LoggedChart("Loss", LOSS),
        ),
        card=Card(
            summary="A model that scores answers: the higher the score, the more the annotators would like the answer. "
            "It does not write text.",
            how="On pairs of answers, one of them preferred, with `trl.RewardTrainer`.",
            limit="Its scores compare answers to the same prompt; across prompts, and for answers unlike those that it "
            "was trained on, they mean little. A policy that is trained against it for long finds its blind spots.",
            tags=("trl", "reward-trainer"),
        ),
    ),
    # Not a step: a reward model whose directory is called N_judge.
    "judge": StageKind(
        name="Reward model that judges",
        generates=False,
        aims=("reward_accuracy",),
        remedy="the win rates that it judges are noise: give it more pairs, or train it longer (num_train_epochs)",
    ),
    "ppo": _preference_tuning(
        "PPO",
        trainer="pipeline.rl.ppo:PPOTrainer",
        how="By PPO against a reward model, with a critic, on TRL's `GRPOTrainer`.",
        limit="It was tuned to please a reward model, which is not the same as being right.",
        remedy="PPO is as good as its reward model: check that one first, then train longer (max_steps), raise "
        "learning_rate or lower kl_coef",
        seconds=53,
        samples=True,
        has_critic=True,
        data="prompt",
        held_out="prompts",
        smoke=SMOKE_ROLLOUTS,
        charts=(
            LoggedChart(
                "What PPO maximises",
                (("score", "objective/scores"), ("score minus KL penalty", "objective/rlhf_reward")),
                note="Scores are normalised as in training.",
            ),
            LoggedChart("KL to the initial policy, nats per answer", (("KL", "objective/kl"),)),
            ENTROPY,
            LoggedChart("Answer length, tokens", (("mean", "completions/mean_length"),)),
        ),
        box=Box(
            about="It learns which of its answers people like better.",
            goes_in="prompts, and choices between two answers",
            trains="what people chose",
            parts=(
                ("Choices", "two answers to one prompt: which is better?"),
                ("reward", "a second model learns to score answers as the choices would"),
                ("PPO", "its own answers with high scores become more likely, in small steps"),
                ("or DPO", "without a second model: preferred answers become more likely, the others less"),
            ),
            drawing="score",
            section="prefer",
            place="gains",
        ),
        watch="PPO gives each token its own reward: minus the distance that the model has moved from its reference, "
        "and for the last token the score of the reward model. The critic guesses before each token what is still to "
        "come; the advantage is how much better the token did than that.",
    ),
    "dpo": _preference_tuning(
        "DPO",
        trainer="pipeline.training.fine_tuning:DPOTrainer",
        how="By DPO on pairs of answers, one of them preferred, without a reward model, with `trl.DPOTrainer`.",
        limit="It learned which answers of a fixed set were preferred. That is not the same as being right, and says "
        "little about answers that are unlike them.",
        remedy="DPO is as good as its pairs: sample more of them from the model that it starts from, then train longer "
        "(max_steps, num_train_epochs), raise learning_rate or lower beta",
        seconds=80,
        box_of="ppo",
        data="preference",
        held_out="pairs",
        charts=(
            LoggedChart(
                "Preferred answers that became likelier than the others",
                (("training", "rewards/accuracies"), ("validation", "eval_rewards/accuracies")),
                note="Share of pairs, compared with the initial policy; 0.5 is chance.",
            ),
            LoggedChart(
                "What DPO calls the reward of an answer",
                (("preferred", "rewards/chosen"), ("other", "rewards/rejected")),
                note="beta times the log of how much likelier the answer became.",
            ),
            LoggedChart("Loss", LOSS),
            ENTROPY,
        ),
    ),
    "kto": _preference_tuning(
        "KTO",
        trainer="pipeline.training.fine_tuning:KTOTrainer",
        how="By KTO on answers that were wanted or not, one by one, without a reward model, with `trl.KTOTrainer`.",
        limit="It learned which answers of a fixed set were wanted. That is not the same as being right, and says "
        "little about answers that are unlike them.",
        remedy="KTO is as good as its labels: give it more answers, both wanted and unwanted (or weight the rarer ones "
        "with desirable_weight or undesirable_weight), then train longer (max_steps, num_train_epochs), raise "
        "learning_rate or lower beta",
        seconds=150,
        box_of="ppo",
        data="unpaired",
        charts=(
            LoggedChart(
                "What KTO calls the reward of an answer",
                (("wanted", "rewards/chosen"), ("unwanted", "rewards/rejected")),
                note="beta times the log of how much likelier the answer became.",
            ),
            LoggedChart("KL to the initial policy, nats per answer", (("KL", "kl"),)),
            LoggedChart("Loss", LOSS),
            ENTROPY,
        ),
    ),
    "grpo": _training(
        name="Reasoning",
        method="GRPO",
        module="recipes.grpo",
        trainer="pipeline.rl.grpo:GRPOTrainer",
        seconds=40,
        samples=True,
        data="prompt",
        held_out="problems",
        aims=("pass@1", "pass@1_sampled", "pass@8", "environment_reward", "step_rate"),
        remedy="train longer (max_steps), raise learning_rate or num_generations, or start from a stage that already "
        "solves some of these problems",
        smoke={**SMOKE_ROLLOUTS, "num_generations": 4},
        charts=(
            LoggedChart("Reward", (("training", "reward"), ("validation", "eval_reward")), note="Correctness only."),
            ENTROPY,
            LoggedChart(
                "Answer length, tokens",
                (("mean", "completions/mean_length"), ("validation", "eval_completions/mean_length")),
                note="The reward does not depend on length.",
            ),
        ),
        box=Box(
            about="It tries problems whose answer can be checked, and learns to work them out.",
            goes_in="problems with a known result",
            trains="whether the result is right",
            parts=(
                ("Prompt", "a problem"),
                ("Completions", "several attempts at it"),
                ("Check", "is the result right?"),
                ("Update", "right attempts become more likely, wrong ones less; then the next problem"),
            ),
            drawing="attempts",
            section="rollout",
            place="reasoning",
        ),
        watch="GRPO lets the model try a problem several times. What did better than the average of its group becomes "
        "more likely.",
        card=Card(
            summary="A chat model that was tuned to reason its way to right answers.",
            how="By GRPO, with rewards for right final answers, with `trl.GRPOTrainer`.",
            limit="It was rewarded for its final answer: the steps before it may be wrong where the answer is right.",
            tags=("trl", "grpo", "reasoning"),
        ),
    ),
}
"""The kinds of stages, in the order of training: steps of the same number run in this order, and are shown in it."""


def kind_in_name(name: str) -> str:
    """Return the kind of stage in the name of a directory or of a YAML file without its suffix.

    Example:
        "2_sft", "2_sft_again", "sft" -> "sft"
        "4_my_model" -> "my_model", as `STAGES` has no kind "my"
    """
    rest = re.sub(r"^\d+_", "", name)
    first_word = rest.partition("_")[0]
    return first_word if first_word in STAGES else rest


def stage_order(name: str) -> tuple[float, int, str]:
    """Return a key that sorts the names of stages: 2_sft, 3_reward, 3_ppo, 10_grpo.

    Names are sorted by their number, then by the place of their kind in `STAGES`, then as text. A name without a
    number comes last. A kind that is not in the table comes last among the names of its number.
    """
    match = re.match(r"\d+", name)
    number = math.inf
    if match:
        number = int(match.group())
    kind = kind_in_name(name)
    kinds = [*STAGES, kind]
    return number, kinds.index(kind), name


def find_baseline(name: str) -> Baseline | None:
    """Return the entry of a baseline in `BASELINES`, or None. `best_of_4` has the entry `best_of`."""
    return BASELINES.get(re.sub(r"_\d+$", "", name))
