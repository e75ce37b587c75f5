"""From votes to a policy: a run waits for people, learns from a client that votes by a taste, and follows it."""

import argparse
import json
import re
import socket
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from starlette.testclient import TestClient

from pipeline.__main__ import main
from pipeline.app import server
from pipeline.app.site import Site
from pipeline.app.voting import routes
from pipeline.errors import EXIT_WAITING
from pipeline.runner import status
from pipeline.runner.due import decide
from pipeline.runner.plan import read_plan
from pipeline.runner.records import RunRecord
from tests.helpers import ppo_toy as toy
from tests.helpers.files import write_rows
from tests.helpers.small_model import ROOT

VOTES = 120
TRAINING = {"bf16": False, "report_to": "none", "logging_steps": 10, "save_strategy": "no", "eval_strategy": "no"}
RECIPE: dict[str, dict[str, Any]] = {
    "3_votes": {"model_name_or_path": "policy", "dataset_name": "prompts.jsonl", "min_votes": VOTES},
    "3_reward": {
        "model_name_or_path": "policy",
        "dataset_name": "runs/toy/votes",
        "learning_rate": 1e-2,
        "max_length": 64,
        "num_train_epochs": 6,
        "per_device_train_batch_size": 16,
        **TRAINING,
    },
    "3_ppo": {
        "model_name_or_path": "policy",
        "dataset_name": "prompts.jsonl",
        "validation_share": 0.3,
        "reward_model_path": "runs/toy/3_reward",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 60,
        "per_device_train_batch_size": 32,
        "num_generations": 1,
        "kl_coef": 0.01,
        "max_completion_length": 6,
        **TRAINING,
    },
    "evaluate": {"judge": "tests.helpers.ppo_toy:share_of_red", "elicit": None},
}
OUTPUTS = {"3_votes": "runs/toy/votes", "3_reward": "runs/toy/3_reward", "3_ppo": "runs/toy/3_ppo"}


def vote(client: TestClient, name: str, votes: int) -> dict[str, Any]:
    """Prefer the answer with the larger share of "red", until so many votes are there; returns the state."""
    who = {"annotator": name, "page": "page"}
    answer = client.post("/prefer/next", json=who).json()
    while answer["state"]["usable"] < votes:
        pair = answer["pair"]
        red = [toy.share_of_red([[{"content": pair[place]}]])[0] for place in ("first", "second")]
        choice = "tie" if red[0] == red[1] else ("first", "second")[red[0] < red[1]]
        ballot = {**who, "vote": f"{name}-{answer['state']['all']}", "pair": pair["pair"], "choice": choice}
        answer = client.post("/prefer/vote", json=ballot).json()
    return dict(answer["state"])


@pytest.mark.usefixtures("shared_warm_process")
def test_a_run_waits_for_people_and_its_policy_follows_their_taste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    toy.policy().save_pretrained("policy")
    toy.tokenizer().save_pretrained("policy")
    pairs = product(toy.WORDS, repeat=2)
    write_rows(Path("prompts.jsonl"), [{"prompt": f"{first} {second}"} for first, second in pairs])
    Path("accelerate_config.yaml").symlink_to(ROOT / "accelerate_config.yaml")
    Path("recipe").mkdir()
    for name, values in RECIPE.items():
        output = {"output_dir": OUTPUTS[name]} if name in OUTPUTS else {}
        Path(f"recipe/{name}.yaml").write_text(yaml.safe_dump({**values, **output}))

    assert main(["run", "recipe", "--plain"]) == EXIT_WAITING
    out, err = capfd.readouterr()
    assert f"0 of {VOTES} votes" in err and "fourstage app runs/toy" in err
    assert f"3_votes waits for {VOTES} votes" in out and "Traceback" not in err
    steps = {step.name: step for step in read_plan(Path("recipe")).steps}
    assert Path("runs/toy/votes/votes.jsonl") in steps["evaluate_3_reward"].files, "also before there are votes"
    status.main(argparse.Namespace(run=Path("runs/toy")))
    assert re.search(r"3_votes +waiting .*waits for people's votes", capfd.readouterr().out)

    sites: list[Site] = []
    monkeypatch.setattr(server, "serve", sites.append)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert main(["app", "runs/toy", "--min_p", "0", "--max_new_tokens", "6", "--port", port]) == 0
    (site,), app = sites, FastAPI()
    assert site.models.names == ["policy"], "the command that the waiting run names works as it is"
    app.include_router(routes(site))
    with TestClient(app) as client:
        state = vote(client, "ann", VOTES)
    assert state["goal"] == VOTES and state["command"] == "fourstage run recipe"

    assert main(["run", "recipe", "--plain"]) == 0
    metrics = json.loads(Path("runs/toy/report/metrics.json").read_text())["stages"]
    people = metrics["3_reward"]["reward_accuracy_people"]
    assert people["value"] > 0.75 and people["n"] >= 5
    assert people["ci95"][0] <= people["value"] <= people["ci95"][1]
    assert metrics["0_base"]["win_rate"]["value"] < 0.65 < metrics["3_ppo"]["win_rate"]["ci95"][0]

    plan = read_plan(Path("recipe"))

    def due() -> set[str]:
        decisions = decide(plan.steps, RunRecord.read(plan.run_dir))
        return {name for name, decision in decisions.items() if decision.action != "skip"}

    assert not due()
    votes = Path("runs/toy/votes/votes.jsonl")
    (votes.with_name("pairs.jsonl")).write_text("")
    assert not due(), "pairs are not votes"
    another = json.loads(votes.read_text().split("\n")[0]) | {"id": "another", "annotator": "bob"}
    with votes.open("a") as file:
        file.write(json.dumps(another) + "\n")
    assert due() == {"3_reward", "evaluate_3_reward", "3_ppo", "evaluate_3_ppo", "report"}
    forced = decide(plan.steps, RunRecord.read(plan.run_dir), forced=[step.name for step in plan.steps])
    assert forced["3_reward"].replaced and not forced["3_votes"].replaced, "votes are never deleted"
