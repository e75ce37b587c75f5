"""The cards of critics, base models, data sets and reports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, ModelCard, ModelCardData, SpaceCardData
from yaml import YAMLError

from pipeline.errors import Problem, UserError
from pipeline.hub.cards import CRITIC, Trained, fenced
from pipeline.hub.contents import places, without_paths
from pipeline.hub.stages import registration


def base_card(name: str, trained: Trained) -> str:
    """Return the README.md of the base model `name` of an adapter, if it was merged from an earlier adapter."""
    start = trained.on_hub(trained.settings.get("model_name_or_path"))
    data = ModelCardData(
        base_model=start,
        license=trained.license,
        library_name="transformers",
        tags=["fourstage", *trained.about.card.tags],
    )
    source = f"[{start}](https://huggingface.co/{start})" if start else "an earlier adapter"
    text = (
        f"What the adapter [{trained.name}](https://huggingface.co/{trained.name}) was trained on, and loads: {source}"
    )
    title = name.rsplit("/", 1)[-1]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}, merged into its base model.\n"))


def critic_card(name: str, config: Mapping[str, Any]) -> str:
    """Return the README.md of the critic inside the repository `name` of a policy.

    Args:
        name: The repository.
        config: The critic's configuration; empty if it is an adapter.
    """
    data = ModelCardData(library_name="transformers" if config else "peft", tags=["fourstage", "critic", "ppo"])
    code = f"""\
{registration(config)}from transformers import AutoModelForTokenClassification

critic = AutoModelForTokenClassification.from_pretrained("{name}", subfolder="{CRITIC}")"""
    if not config:
        code = f"""\
from peft import PeftConfig, PeftModel
from transformers import AutoModelForTokenClassification

base = PeftConfig.from_pretrained("{name}", subfolder="{CRITIC}").base_model_name_or_path
model = AutoModelForTokenClassification.from_pretrained(base, num_labels=1)
critic = PeftModel.from_pretrained(model, "{name}", subfolder="{CRITIC}")"""
    return str(
        ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# The critic of {name.rsplit('/', 1)[-1]}\n\n"
            "It estimates, at each token of an answer, the reward that the whole answer will get from the reward model "
            "of that run, less what the penalty on leaving the reference model costs. PPO needs it; to score answers, "
            f"use a reward model instead.\n\n{fenced(code, 'python')}\n\n"
            f"To start PPO from it, give `value_model_path: {name}` to `recipes.ppo`.\n"
        )
    )


def load_card(folder: Path) -> DatasetCard:
    """Return the card of a folder of data, empty if it has none.

    Raises:
        UserError: If it cannot be read.
    """
    path = folder / "README.md"
    try:
        return DatasetCard.load(path) if path.exists() else DatasetCard("---\n{}\n---\n")
    except (OSError, ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(Problem("RUN", path, f"cannot be read as a data card ({reason}); correct it")) from None


def dataset_card(folder: Path, name: str, ids: Mapping[str, str], license: Any = None) -> str:
    """Return the README.md of a folder of data, with its licence, tags and how to load it.

    Args:
        folder: The folder. The text of its own card is kept.
        name: Id of its repository.
        ids: Repositories of the other outputs of the run, which the text may name, by the names of their directories.
        license: Its licence. Default: that which its own card names.
    """
    card = load_card(folder)
    card.data.license = license or card.data.license
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), "fourstage"]))
    card.data.task_categories = card.data.task_categories or ["text-generation"]
    configs = [config["config_name"] for config in card.data.get("configs") or []]
    chosen = f', "{configs[0]}"' if configs and configs != ["default"] else ""
    code = f'from datasets import load_dataset\n\ndata = load_dataset("{name}"{chosen})'
    text = card.text.strip() or f"# {name.rsplit('/', 1)[-1]}"
    for output, found in ids.items():
        text = re.sub(rf"(?<![\w/.~-])[\w/.~-]*/{re.escape(output)}(?![\w/-])", found, text)
    body = f"{text}\n\n## How to use it\n\n{fenced(code, 'python')}\n"
    return without_paths(f"---\n{card.data.to_yaml()}\n---\n\n{body}", places(folder))


def space_card(title: str, models: Sequence[str], datasets: Sequence[str]) -> str:
    """Return the README.md of a static Space that shows a report."""
    data = SpaceCardData(
        title=title, sdk="static", app_file="index.html", emoji="📈", colorFrom="blue", colorTo="indigo", pinned=False,
        models=list(models), datasets=list(datasets), tags=["fourstage"],
    )  # fmt: skip
    lines = [f"- [{name}](https://huggingface.co/{name})" for name in models]
    text = "The figures of the run, with its settings and commands in `run.json` and every figure in `metrics.json`."
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n\n" + "\n".join(lines) + "\n"
