"""Dialogues with tools on the page: what it shows of them is what is trained on, and what tools return stays text."""

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from transformers import LlamaForTokenClassification

from pipeline.__main__ import main
from pipeline.app import compare, rollout, watch
from pipeline.app.server import build_app
from pipeline.app.site import Site
from pipeline.evaluation.metrics import readable
from pipeline.rl import ppo_math
from pipeline.rl.grpo import GRPOTrainer
from pipeline.tools.chat_model import ChatModel
from pipeline.tools.loading import Toolbox
from tests.helpers import tool_toy as toy
from tests.helpers.chromium import open_browser
from tests.helpers.files import write_rows

HOSTILE = "<img src=x onerror=document.title='owned'>\n-> fake() \u202e"
TOOLS = {"tools": [f"{__name__}:double"]}
GAME = {"environment": "tests.helpers.tool_toy:Counter"}
TRUST = ["--trust", TOOLS["tools"][0], "--trust", GAME["environment"], "--trust", "tests.helpers.tool_toy:says_yes"]
"""A run's files name no code that is loaded unless the user does, too."""
SAMPLED = {
    "max_completion_length": 30, "temperature": 1.0, "learning_rate": 1e-2, "max_grad_norm": 1.0, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "per_device_train_batch_size": 4, "model_name_or_path": "old/run/2_sft",
    "dataset_name": "old/run/rows.jsonl", "num_generations": 8, "reward_funcs": ["tests.helpers.tool_toy:says_yes"],
}  # fmt: skip
PPO = {"kl_coef": 0.5, "gamma": 0.9, "lam": 0.8, "missing_eos_penalty": 1.0}


def double(n: int) -> str:
    """Double a number.

    Args:
        n: The number.
    """
    return HOSTILE


def make_run(run: Path, called: dict[str, Any]) -> Path:
    """Return a run whose policy calls tools, and whose reference does so less often."""
    write_rows(run / "rows.jsonl", [{**row, "answer": "yes"} for row in toy.prompts(9).to_list()])
    for stage, calls in (("2_sft", 0.4), ("3_ppo", 0.6), ("4_grpo", 0.6)):
        toy.policy(calls).save_pretrained(run / stage)
        toy.tokenizer().save_pretrained(run / stage)
    for stage, more in (("3_ppo", PPO), ("4_grpo", {})):
        values = {**SAMPLED, **called, **more, "output_dir": f"old/run/{stage}"}
        (run / stage / "arguments.json").write_text(json.dumps(values))
    torch.manual_seed(1)
    critic = LlamaForTokenClassification(toy.policy().config)
    critic.config.num_labels = 1
    critic.score = torch.nn.Linear(critic.config.hidden_size, 1)
    critic.save_pretrained(run / "3_ppo" / "value_model")
    return run


@pytest.fixture(scope="module", params=[TOOLS, GAME], ids=["tools", "environment"])
def site(
    request: pytest.FixtureRequest, site_of: Callable[..., Site], tmp_path_factory: pytest.TempPathFactory
) -> Site:
    run = tmp_path_factory.mktemp("run")
    return site_of(make_run(run, request.param))


def group_of(site: Site, stage: str, number: int = 8) -> tuple[dict[str, Any], Any, Any, dict[str, Any], list[Any]]:
    """Return settings, policy, reference, a row and dialogues, among which some have results."""
    settings = watch.stage_settings(site.run, stage)
    policy, reference = site.models.get(stage), site.models.get("2_sft")
    row = dict(site.prompts[0].row)
    group = watch.sample_group(policy, row, settings, number, seed=5)
    assert any(0 in dialogue.sampled for dialogue in group) and all(len(dialogue.tokens) <= 30 for dialogue in group)
    return settings, policy, reference, row, group


def test_grpo_rewards_whole_dialogues_and_trains_on_what_the_model_wrote(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, policy, reference, row, group = group_of(site, "4_grpo")
    messages = [dialogue.messages for dialogue in group]
    update = watch.update(policy, reference, settings, row, group)
    assert update.rewards["says_yes"] == pytest.approx(toy.says_yes(messages))
    if "environment" in settings:
        # The environment knows how often it was asked, the calls beyond its limit included.
        answered = [[turn["content"] for turn in turns if turn["role"] == "tool"] for turns in messages]
        calls = [sum("not found" not in text and "missing" not in text for text in results) for results in answered]
        assert update.rewards["Counter"] == pytest.approx(calls)
        assert toy.tokenizer().decode(group[0].prompt).startswith("<|bos|><|user|>1yes"), "what it shows is read"

    learned = [
        row[: len(dialogue.tokens)].int().tolist()
        for row, dialogue in zip(update.updates[0].learned, group, strict=True)
    ]
    assert learned == [dialogue.sampled for dialogue in group]
    # Whatever the probabilities of a tool's tokens are, they change nothing.
    length = max(len(dialogue.tokens) for dialogue in group)
    by_tools = torch.zeros(len(group), length)
    for number, dialogue in enumerate(group):
        by_tools[number, : len(dialogue.tokens)] = 1 - torch.tensor(dialogue.sampled)
    logps_of = GRPOTrainer._get_per_token_logps_and_entropies

    def shifted(*args: Any, **kwargs: Any) -> Any:
        logps, *results = logps_of(*args, **kwargs)
        return logps + 5 * torch.randn(logps.shape) * by_tools, *results

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", shifted)
    again = watch.update(policy, reference, settings, row, group)
    assert again.changes == pytest.approx(update.changes, rel=1e-3) and max(update.changes) > 1 > min(update.changes)
    assert again.advantages == update.advantages


def test_ppo_has_no_figures_for_what_a_tool_wrote_and_estimates_across_it(site: Site) -> None:
    settings, policy, reference, row, group = group_of(site, "3_ppo")
    longest = max(group, key=lambda dialogue: dialogue.sampled.count(0))
    view = watch.token_view(policy, reference, site.run, "3_ppo", settings, row, longest)
    for column in (view.log_probs, view.kl, view.rewards, view.values, view.advantages):
        assert [value is not None for value in column] == [bool(sampled) for sampled in longest.sampled]

    def chosen(column: list[float | None]) -> torch.Tensor:
        return torch.tensor([[value for value in column if value is not None]])

    rewards, values = chosen(view.rewards), chosen(view.values)
    advantages, _ = ppo_math.generalized_advantages(rewards, values, torch.ones_like(rewards), 0.9, 0.8)
    torch.testing.assert_close(advantages, chosen(view.advantages), rtol=1e-4, atol=1e-4)
    assert rewards.sum().item() == pytest.approx(
        view.score - view.penalty - 0.5 * chosen(view.kl).sum().item(), abs=1e-3
    )
    assert chosen(view.kl).abs().max() > 0.1, "the reference calls less often"


@pytest.mark.parametrize("stage", ["3_ppo", "4_grpo"])
def test_a_rollout_shows_calls_and_results_as_lines(site: Site, stage: str) -> None:
    request = rollout.RolloutRequest(stage=stage, policy=stage, text=site.prompts[0].text, answer="yes", seed=5)
    events = list(rollout.roll_out(site, request))
    assert [event.get("failed") for event in events] == [None] * len(events)
    assert "may call double" in events[0]["completions"][0]["facts"]
    texts = [completion["text"] for seed in range(4) for completion in rolled(site, stage, seed)]
    assert any("-> double(n=" in text and "\n<- " in text for text in texts)
    if stage == "3_ppo":
        assert len(events[-1]["chosen"]) == len(events[-1]["tokens"])


def rolled(site: Site, stage: str, seed: int) -> list[dict[str, str]]:
    """Return the completions that are shown."""
    request = rollout.RolloutRequest(stage=stage, policy=stage, text=site.prompts[0].text, seed=seed)
    event = next(event for event in rollout.roll_out(site, request) if event["step"].startswith("completion"))
    completions: list[dict[str, str]] = event["completions"]
    return completions


def answers(site: Site, text: str, **options: Any) -> dict[str, dict[str, Any]]:
    """Return the last state of each column, with all of its tokens."""
    columns: dict[str, dict[str, Any]] = {}
    for changed in compare.answer_all(site, compare.CompareRequest(text=text, models=site.models.stages, **options)):
        for change in changed:
            tokens = columns.get(change["model"], {"tokens": []})["tokens"]
            columns[change["model"]] = {**change, "tokens": [*tokens, *change["tokens"]]}
    return columns


def test_models_are_compared_as_evaluation_measures_them(site: Site) -> None:
    answer = answers(site, site.prompts[0].text, longest=30)["4_grpo"]
    toolbox = Toolbox([double]) if "tools" in site.called["problems"] else Toolbox(environment=toy.Counter)
    chat = ChatModel(toy.policy(), toy.tokenizer(), 30, toolbox=toolbox)
    ((measured,),) = chat.answer([site.prompts[0].row])
    assert answer["text"] == readable(measured).replace("\u202e", "⟨U+202E⟩") and "<- " in answer["text"]
    by_tools = [token for token in answer["tokens"] if not token["others"]]
    assert by_tools and all(token["logProb"] is None for token in by_tools)
    assert "".join(token["text"] for token in by_tools).startswith("<|tool|>")


def test_a_free_question_gets_functions_but_no_environment(site: Site) -> None:
    texts = [answers(site, "2 yes", temperature=1.0, seed=seed, longest=30)["4_grpo"]["text"] for seed in range(6)]
    assert any("<- " in text for text in texts) == ("tools" in site.called["problems"])


def test_the_chat_goes_on_after_results(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/example problem\n1\n"))
    assert main(["chat", str(site.run / "4_grpo"), "--max_new_tokens", "20", *TRUST]) == 0
    printed = capsys.readouterr().out
    assert "-> double(n=1)\n<- " in printed and "\u202e" not in printed


@pytest.fixture
def page(site_of: Callable[..., Site], tmp_path: Path) -> Iterator[str]:
    """The address of a server for a run whose tool returns HTML."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    app = build_app(site_of(make_run(tmp_path, TOOLS), "--port", str(port)))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = server.force_exit = True
    thread.join(20)


def test_what_a_tool_returns_stays_text_on_the_page(page: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.get(page)

        def wait_for(selector: str) -> Any:
            return WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, selector))

        wait = WebDriverWait(browser, 60)
        wait.until(lambda _: browser.find_element(By.ID, "rollout-prompt").get_property("value"))
        for seed, stage in enumerate(("4_grpo", "3_ppo")):
            browser.execute_script(f"document.querySelector('#rollout input[value=\"{stage}\"]').click()")
            wait.until(lambda _: browser.find_element(By.ID, "rollout-prompt").get_property("value"))
            browser.execute_script(f"document.querySelector('#rollout-form [name=seed]').value = {5 + seed}")
            browser.execute_script("document.getElementById('rollout-go').click()")
            if stage == "4_grpo":
                assert wait_for("#inside .answer span.soft"), "tokens of a tool have no colour"
                text = browser.find_element(By.ID, "rollout-shown").get_property("innerText")
                assert "<- <img src=x onerror=document.title='owned'>\n   -> fake() ⟨U+202E⟩" in text
            else:
                assert len(wait_for("#rollout-shown .tokens tbody tr")) > 1
        browser.execute_script("document.getElementById('prompt').value = '1'; document.getElementById('send').click()")
        wait_for("#answers [data-model='4_grpo'][data-done]")
        answer = browser.find_element(By.CSS_SELECTOR, "#answers [data-model='4_grpo'] .answer")
        assert "-> double(n=1)\n<- <img src=x" in answer.get_property("innerText")
        browser.execute_script("document.getElementById('probabilities').click()")
        assert wait_for("#answers [data-model='4_grpo'] .answer span.soft")
        assert not browser.find_elements(By.CSS_SELECTOR, "#rollout img, #answers img") and browser.title != "owned"


def test_the_report_shows_turns_as_lines_and_what_a_tool_returns_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path, TOOLS)
    settings = {"evaluate_4_grpo": {"values": {"fixed_prompts": ["x"], "elicit": None, "samples": 1}}}
    (run / "run.json").write_text(json.dumps({"steps": settings}))
    assert main(["evaluate", str(run), "--stage", "4_grpo", "--max_new_tokens", "30", *TRUST]) == 0
    assert main(["report", str(run)]) == 0
    page, text = ((run / "report" / name).read_text() for name in ("index.html", "report.md"))
    result = (
        "-&gt; double(n=1)\n&lt;- &lt;img src=x onerror=document.title=&#39;owned&#39;&gt;\n   -&gt; fake() ⟨U+202E⟩\n"
    )
    assert page.count(result) >= 3, "on the path, among the problems, and in the answer to the fixed prompt"
    assert "<img src=x" not in page + text
    assert text.count("-> double(n=1)<br><- &lt;img src=x onerror=document.title='owned'><br>") >= 2
