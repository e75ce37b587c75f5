"""The seam to TRL, transformers, PEFT and accelerate: what the project relies on beyond their documented API.

A failure names what moved, and what it is needed for. What a test elsewhere would notice is not listed here: how a
checkpoint is resumed, say, or what the loss of a batch is. Imports need no list either, since each is tried by itself.
CONTRIBUTING says how the seam is tried with other releases.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer
from trl import GRPOTrainer as TRLGRPOTrainer

import pipeline

PIPELINE = Path(__file__).parents[1] / "pipeline"
LIBRARIES = ("trl", "transformers", "peft", "accelerate")
GRPO = "trl:GRPOTrainer"
TRAINER = "transformers:Trainer"

# Private methods that classes of ours override. Each takes what the library's takes.
OVERRIDDEN = {
    # The rollout
    f"{GRPO}._get_train_sampler": "the order of an epoch is that of its number",
    f"{GRPO}._generate_single_turn": "rollouts are sampled by our sampler",
    f"{GRPO}._tool_call_loop": "dialogues with tools are those of evaluation",
    f"{GRPO}._calculate_rewards": "what rewards give is kept, and stops the run if it is unusable",
    f"{GRPO}._generate_and_score_completions": "PPO replaces the advantages it returns",
    f"{GRPO}._get_per_token_logps_and_entropies": "on CPUs, cheaper log-probabilities are returned",
    f"{GRPO}._compute_loss": "completions without an advantage are omitted",
    # Evaluation
    f"{TRAINER}._evaluate": "runs under its own random state",
    # Checkpoints
    f"{TRAINER}._maybe_log_save_evaluate": "checkpoints are written before evaluations",
    f"{TRAINER}._save_checkpoint": "checkpoints are written whole or not at all",
    f"{TRAINER}._get_output_dir": "checkpoints are written elsewhere, and then moved",
    f"{TRAINER}._save": "the parts that belong to the model are saved with it",
    f"{TRAINER}._load_from_checkpoint": "these parts are loaded there",
    f"{TRAINER}._load_best_model": "these parts are loaded there, too",
    f"{TRAINER}._load_optimizer_and_scheduler": "all other parts are loaded there",
    f"{TRAINER}._track_num_input_tokens": "tokens are added up when they are logged or saved",
}

# Functions that are called, by position or with these names ("..." stands for any others).
CALLED = {
    f"{TRAINER}._determine_best_metric": ("self metrics trial", "an evaluation that a kill prevented is run"),
    f"{TRAINER}.create_optimizer": ("self model", "the critic's optimizer is made like the policy's"),
    "peft.utils.other:AuxiliaryTrainingWrapper.unload_and_optionally_merge_module": (
        "self merge safe_merge adapter_names",
        "the critic is a copy with adapters merged",
    ),
    "trl.trainer.utils:add_fused_lm_head": (
        "model temperature cast_lm_head_to_fp32 outputs",
        "gives PPO's reference its head",
    ),
    "trl.chat_template_utils:parse_response": (
        "tokenizer ids prefix tools",
        "what a completion calls is read with the schemas of its tools",
    ),
    "transformers.conversion_mapping:get_checkpoint_conversion_mapping": (
        "model_type",
        "steps are forked after its table was built; without it, they are new processes",
    ),
    "trl.generation.vllm_client:VLLMClient.get_server_info": ("self", "which log-probabilities a server of vLLM gives"),
}

# Private attributes of classes and modules, and a function that is named without being imported.
ATTRIBUTES = {
    "transformers:GenerationConfig._get_default_generation_params": "options of a model's file without effect",
    "transformers:GenerationMixin._get_logits_processor": "what changes logits, in the order of `generate`",
    "transformers:PreTrainedModel._from_config": "models are built without weights, to be checked",
    "transformers:PreTrainedModel._can_set_experts_implementation": "critics of experts are classes of ours",
    "transformers:PreTrainedModel._can_compile_fullgraph": "whether the cache may have room for more tokens",
    "transformers:PreTrainedModel._supports_flash_attn": "FlashAttention is chosen for models that can use it",
    "transformers:PreTrainedModel._tied_weights_keys": "weights that a file may lack",
    "transformers:AutoModelForCausalLM._model_mapping": "whether a model can be loaded as a language model",
    "transformers:PreTrainedConfig._attn_implementation": "packed rows are padded unless FlashAttention reads them",
    "torch.distributed:distributed_c10d._get_default_store": "a process that stops leaves its exit code in it",
    "torch._dynamo.utils:dump_compile_times": "a fork does not run it at exit; without it, steps are new processes",
    "weakref:finalize._registry": "a fork does not finalize what was there before; without it, steps are new processes",
}

# Attributes of a trainer that has trained, and what for.
TRAINER_ATTRIBUTES = {
    "_step": "the place in the rollout, saved and restored",
    "_buffered_inputs": "the rollout, saved and restored",
    "_metrics": "PPO's metrics are added to it",
    "_logs": "PPO's advantages are shown in it",
    "_tokenizer": "its vocabulary is compared with the reward models'",
    "_is_vlm": "PPO refuses multimodal models",
    "_entropy_bonus_enabled": "entropies have gradients in TRL's loss if it is set",
    "_last_world_entropy": "the adaptive entropy bonus, saved and restored",
    "generation_config": "the settings of sampling",
    "use_transformers_continuous_batching": "TRL samples then",
    "eos_token_ids": "whether a completion ended",
    "reward_funcs": "reward models are replaced by functions, and functions are guarded",
    "reward_func_names": "names in messages",
    "reward_processing_classes": "the tokenizers of reward models",
    "reward_weights": "PPO's score is the weighted sum",
    "ref_model": "None as long as beta is 0",
    "beta": "the weight of the KL in the loss, 0 in PPO, which computes what the reference gives by itself",
    "current_gradient_accumulation_steps": "the value loss is normalised as the policy loss is",
}

# Attributes of one that has trained with tools.
TOOL_ATTRIBUTES = {"_sync_tool_dicts": "the tools of each completion of a rollout"}

# What a run logs, and the alarms or the report read.
LOGGED = {
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "kl",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "grad_norm",
    "learning_rate",
    "clip_ratio/region_mean",
}

# Tensors of a batch in `_buffered_inputs`, which PPO trains on and saves.
BATCH = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
    *("advantages", "num_items_in_batch", "old_per_token_logps", "ref_per_token_logps", "returns", "old_values"),
}

# Private attributes in these files are our own.
OURS = ("rewards/sandbox", "config/yaml_file.py")


def moved(what: str, why: str) -> str:
    return f"{what} is not as expected: {why}"


def look_up(name: str) -> Any:
    """Return what a `module:name` names, None if it is not there."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def imports() -> Iterator[tuple[str, Path]]:
    """Yield what is imported from modules inside the libraries, and where."""
    for path in PIPELINE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
                yield from ((f"{node.module}:{alias.name}", path.relative_to(PIPELINE)) for alias in node.names)


def moved_names() -> Iterator[str]:
    for name, path in imports():
        if look_up(name) is None:
            yield moved(name, f"pipeline/{path} imports it")
    for name, why in ATTRIBUTES.items():
        # The default of `_tied_weights_keys` is None.
        if look_up(name) is None and name.rpartition(".")[2] != "_tied_weights_keys":
            yield moved(name, why)
    for name, why in OVERRIDDEN.items():
        if look_up(name) is None:
            yield moved(name, why)
    for name, (expected, why) in CALLED.items():
        function = look_up(name)
        if function is None or parameters(function) != expected.split():
            yield moved(f"the signature of {name}", why)
    # Releases that need Triton for it have None on a machine without.
    if look_up("trl.trainer.utils:_ChunkedLogProbFunction") is None:
        yield moved("the fused head", "PPO, GRPO, DPO and KTO train with it on CPUs, too")


def overrides() -> Iterator[tuple[type, type, str]]:
    """Yield classes of ours, those of the libraries that they inherit from, and the methods that they override."""
    for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if module.name.endswith("__main__"):
            continue
        for ours in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(ours) or ours.__module__ != module.name:
                continue
            bases = [base for base in ours.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
            # A mixin has no base of its own.
            bases = bases or ([TRLGRPOTrainer, Trainer] if ours.__name__ == "Reliable" else [])
            for name, function in vars(ours).items():
                theirs = next((base for base in bases if name in vars(base)), None)
                if inspect.isfunction(function) and theirs is not None and not name.startswith("__"):
                    yield ours, theirs, name


def moved_overrides() -> Iterator[str]:
    for ours, theirs, name in overrides():
        actual, expected = (inspect.signature(vars(kind)[name]).parameters for kind in (ours, theirs))
        kinds = {parameter.kind for parameter in actual.values()}
        accepts_any = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
        missing = set() if accepts_any or inspect.Parameter.VAR_KEYWORD in kinds else set(expected) - set(actual)
        if missing:
            yield moved(f"{theirs.__name__}.{name}", f"{ours.__name__}.{name} does not take {sorted(missing)}")


def moved_in_a_run(folder: Path) -> Iterator[str]:
    from trl import GRPOConfig
    from trl.trainer.utils import RepeatSampler

    from pipeline.rl.grpo import GRPOTrainer
    from pipeline.rl.ppo import PPOTrainer
    from tests.helpers import ppo_toy as toy
    from tests.helpers import tool_toy

    sampler = RepeatSampler([1, 2], mini_repeat_count=1, seed=3)
    for name in ("shuffle", "generator", "seed"):
        if not hasattr(sampler, name):
            yield moved(f"RepeatSampler.{name}", "the order of an epoch is drawn from it")

    ppo = PPOTrainer(
        toy.policy(),
        toy.share_of_red,
        toy.config(folder / "ppo", max_steps=1),
        toy.prompts(),
        processing_class=toy.tokenizer(),
    )
    if "forward" not in ppo.model.__dict__:
        yield moved("add_fused_lm_head", "it patches the forward of the instance, and the copy undoes that")
    ppo.train()
    for name, why in TRAINER_ATTRIBUTES.items():
        if not hasattr(ppo, name):
            yield moved(f"GRPOTrainer.{name}", why)
    if set(ppo._buffered_inputs[0]) != BATCH:
        yield moved("the batch of _generate_and_score_completions", "PPO saves and trains on its tensors")
    toy.policy().save_pretrained(folder / "policy")
    settings = {
        name: getattr(ppo.args, name) for name in ("max_steps", "bf16", "use_cpu", "report_to", "logging_steps")
    }
    grpo = GRPOTrainer(
        model=str(folder / "policy"),
        reward_funcs=toy.share_of_red,
        args=GRPOConfig(str(folder / "grpo"), beta=0.1, max_completion_length=6, **settings),
        train_dataset=toy.prompts(),
        processing_class=toy.tokenizer(),
    )
    grpo.train()
    called = GRPOTrainer(
        tool_toy.policy(),
        tool_toy.says_yes,
        GRPOConfig(str(folder / "called"), max_completion_length=24, **settings),
        tool_toy.prompts(),
        processing_class=tool_toy.tokenizer(),
        tools=[tool_toy.double],
    )
    called.train()
    for name, why in TOOL_ATTRIBUTES.items():
        if not hasattr(called, name):
            yield moved(f"GRPOTrainer.{name}", why)
    logged = {name for entry in grpo.state.log_history for name in entry}
    if missing := LOGGED - logged:
        yield moved(f"what GRPO logs: {sorted(missing)}", "alarms and report read it")


def test_the_libraries_are_as_expected(tmp_path: Path) -> None:
    problems = list(moved_names())
    for look in (moved_overrides, lambda: moved_in_a_run(tmp_path)):
        try:
            problems += look()
        except Exception as error:
            if not problems:
                raise
            # The names that moved may be the reason.
            problems.append(f"pipeline does not run: {error!r}")
    if problems:
        releases = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        listed = "\n".join(problems)
        pytest.fail(f"Adapt pipeline/ to {releases}, or pin older releases in setup.cfg:\n{listed}", pytrace=False)


def private_attributes() -> Iterator[tuple[str, Path]]:
    """Yield the private attributes in our code that may be the libraries'."""
    trees = {path: ast.parse(path.read_text()) for path in PIPELINE.rglob("*.py")}
    nodes = [(node, path) for path, tree in trees.items() for node in ast.walk(tree)]
    defined = {node.name for node, _ in nodes if isinstance(node, ast.FunctionDef)}
    defined |= {node.attr for node, _ in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    sources = [inspect.getsource(inspect.getmodule(kind)) for kind in (TRLGRPOTrainer, Trainer)]
    theirs = {name for source in sources for name in re.findall(r"self\.(\w+)", source)}
    for node, path in nodes:
        private = isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)
        if private and (node.attr not in defined or node.attr in theirs):
            yield node.attr, path.relative_to(PIPELINE)


def test_all_that_is_relied_on_is_listed() -> None:
    # The last one is a trainer's that samples with vLLM, see `tests/rl/test_vllm.py`.
    listed = {
        *TRAINER_ATTRIBUTES,
        *TOOL_ATTRIBUTES,
        "_name_or_path",
        "_asdict",
        "_orig_mod",
        "_exit",
        "_fingerprint",
        "_run_exitfuncs",
        "_shutdown",
        "_last_loaded_step",
    }
    listed |= {name.rpartition(".")[2] for name in (*OVERRIDDEN, *CALLED, *ATTRIBUTES)}
    used = {(name, path) for name, path in private_attributes() if not str(path).startswith(OURS)}
    unlisted = sorted(f"{name} ({path})" for name, path in used if name not in listed)
    assert not unlisted, "not in the tables of this file"
    overridden = {name for _, _, name in overrides() if name.startswith("_")}
    assert overridden == {name.rpartition(".")[2] for name in OVERRIDDEN}
