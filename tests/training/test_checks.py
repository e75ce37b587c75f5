"""Checks of the training arguments that no refused command line shows: what they accept, and the model's own files."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GenerationConfig, LlamaConfig
from trl import GRPOConfig, ModelConfig

from pipeline.training.checks import check_generation_config, check_lora, preflight


def config(**changes: Any) -> GRPOConfig:
    return GRPOConfig("-", bf16=False, use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"generation_kwargs": {"use_cache": True, "cache_implementation": "static"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"temperature": 0.7, "min_p": 0.0},
    ],
    ids=str,
)
def test_what_training_sees_is_accepted(changes: dict[str, Any]) -> None:
    assert preflight(config(**changes)) == []


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which vLLM can sample."""
    monkeypatch.setattr("pipeline.training.checks.validate_vllm", lambda: None)
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)


def on_gpu(**changes: Any) -> GRPOConfig:
    args = config(use_vllm=True, **changes)
    args.use_cpu = False
    return args


@pytest.mark.usefixtures("with_vllm")
def test_vllm_corrects_what_training_does_not_see() -> None:
    filtered = {"top_p": 0.9, "generation_kwargs": {"presence_penalty": 1.0}}
    assert preflight(on_gpu(**filtered)) == []
    uncorrected = preflight(on_gpu(**filtered, vllm_importance_sampling_correction=False))
    assert [problem.field for problem in uncorrected] == ["top_p", "generation_kwargs"]


@pytest.mark.usefixtures("with_vllm")
def test_what_vllm_cannot_do_is_refused() -> None:
    assert [problem.field for problem in preflight(config(use_vllm=True))] == ["use_cpu"]
    problems = preflight(on_gpu(vllm_tensor_parallel_size=2, generation_kwargs={"seed": 1, "n": 2, "top_k": 5}))
    assert [problem.field for problem in problems] == ["generation_kwargs", "vllm_tensor_parallel_size"]
    assert "n, seed cannot be given" in problems[0].remedy


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(
    ("logprobs_mode", "dev_mode", "refused"),
    [
        ("processed_logprobs", True, ""),
        ("raw_logprobs", True, "raw_logprobs, which cannot correct the loss"),
        ("processed_logprobs", False, "VLLM_SERVER_DEV_MODE=1"),
        (None, False, "can't be reached"),
    ],
)
def test_a_server_of_vllm_answers_before_anything_is_loaded(
    logprobs_mode: str | None, dev_mode: bool, refused: str
) -> None:
    """The server takes the weights of each step, and returns the probabilities that tokens were drawn with."""
    answers: dict[str, Any] = {"/health": {}, "/v1/models": {"data": [{"id": "model"}]}}
    if dev_mode:
        answers["/server_info"] = {"vllm_config": {"model_config": {"logprobs_mode": logprobs_mode}}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path.partition("?")[0])
            self.send_response(404 if answer is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        if logprobs_mode is None:
            server.server_close()
        else:
            Thread(target=server.serve_forever, daemon=True).start()
        args = on_gpu(vllm_mode="server", vllm_server_base_url=url, vllm_server_timeout=1e-9)
        problems = preflight(args)
        if logprobs_mode is not None:
            server.shutdown()
    assert [problem.field for problem in problems] == ["vllm_mode"] * bool(refused)
    assert all(refused in problem.remedy and "vllm serve MODEL" in problem.remedy for problem in problems)


@pytest.mark.parametrize(
    ("saved", "refused"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}, []),
        ({"eos_token_id": [1, 2], "pad_token_id": 3, "max_length": 100}, []),
        ({"output_attentions": False, "num_beams": 1, "typical_p": 1.0, "min_length": 0, "do_sample": True}, []),
        ({"no_repeat_ngram_size": 3, "do_sample": True}, ["no_repeat_ngram_size"]),
        ({"min_p": 0.1, "suppress_tokens": [5], "do_sample": True}, ["min_p", "suppress_tokens"]),
    ],
    ids=str,
)
def test_a_models_own_options_of_generation(tmp_path: Path, saved: dict[str, Any], refused: list[str]) -> None:
    # The file is optional.
    assert check_generation_config(str(tmp_path), None) == []
    GenerationConfig(**saved).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()).items() >= saved.items()
    problems = check_generation_config(str(tmp_path), None)
    assert [problem.field for problem in problems] == ["model_name_or_path"] * bool(refused)
    assert all(f"'{name}'" in problems[0].remedy for name in refused)


@pytest.mark.parametrize(("targets", "fits"), [(["score"], False), (["q_proj", "score"], True), (["q_proj"], True)])
def test_lora_of_a_reward_model_needs_a_target_besides_the_head(targets: list[str], fits: bool) -> None:
    """PEFT trains and saves the head, `score`, as a whole, and makes no adapter for it."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(LlamaConfig(vocab_size=9, num_labels=1, **sizes))
    model_args = ModelConfig(use_peft=True, lora_r=1)
    model_args.lora_target_modules = targets
    problems = check_lora(model_args, model)
    assert [problem.field for problem in problems] == ([] if fits else ["lora_target_modules"])


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"optim_args": "foo"}, "optim_args"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "optim_args"),
        ({"optim": "galore_adamw"}, "optim"),
        ({"optim": "galore_adamw", "optim_args": "rank=2"}, "optim"),
    ],
    ids=str,
)
def test_an_optimizer_that_cannot_be_made_is_the_mistake_of_a_field_that_was_given(
    given: dict[str, str], field: str
) -> None:
    assert [problem.field for problem in preflight(config(**given))] == [field]
