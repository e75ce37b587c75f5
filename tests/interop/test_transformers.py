"""What the recipes write opens in the tools of transformers and PEFT, and answers there as it does here.

`tests/recipes/test_sft.py` opens the adapter of a language model.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pipeline.models.generation import encode_prompts, generate
from pipeline.models.loading import load_model
from pipeline.preferences.judges import score
from tests.helpers.small_model import conversation, run_recipe

TRANSFORMERS = (sys.executable, "-m", "transformers.cli.transformers")
QUESTION = conversation("What is 3?", "")[:1]
SHORT = ("--bf16", "false", "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no")
LORA = ("--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


def train(folder: Path, recipe: str, *more: str) -> Path:
    output = folder / "-".join([recipe, *more[:1]])
    done = run_recipe(recipe, folder / "inputs", "--output_dir", str(output), "--learning_rate", "1e-2", *SHORT, *more)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def chat_model(folder: Path) -> str:
    return str(train(folder, "sft"))


@pytest.fixture(scope="module")
def answer(chat_model: str) -> str:
    """Return the greedy answer of the project's own evaluation."""
    model, tokenizer = load_model(chat_model, "model")
    ((completion,),) = generate(model.eval(), tokenizer, encode_prompts(tokenizer, [QUESTION]), max_new_tokens=8)
    assert completion.text
    return tokenizer.decode(completion.tokens, skip_special_tokens=True)


def test_a_text_generation_pipeline_answers_messages(chat_model: str, answer: str) -> None:
    ask = pipeline("text-generation", model=chat_model, device="cpu")
    (output,) = ask(QUESTION, max_new_tokens=8, do_sample=False)
    assert output["generated_text"] == [*QUESTION, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def server(chat_model: str) -> Iterator[str]:
    """Run `transformers serve` on the model, and return its address."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([*TRANSFORMERS, "serve", chat_model, *options], stderr=subprocess.PIPE)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                with urlopen(f"{address}/health", timeout=5):
                    break
            except (URLError, ConnectionError, TimeoutError):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_transformers_serve_answers_as_openai_does(server: str, chat_model: str, answer: str) -> None:
    body = {"model": chat_model, "messages": QUESTION, "max_tokens": 8, "temperature": 0.0, "stream": False}
    request = Request(f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        (choice,) = json.load(response)["choices"]
    assert choice["message"]["content"] == answer


def test_transformers_chat_shows_the_answer(server: str, chat_model: str, answer: str) -> None:
    command = [*TRANSFORMERS, "chat", chat_model, server, "max_new_tokens=8", "do_sample=False"]
    # The "n" answers whether to go on after the token limit.
    said = f"{QUESTION[0]['content']}\nn\n!exit\n"
    # While offline, it would not even ask the server.
    online = os.environ | {"HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, input=said, env=online, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert " ".join(answer.split()) in " ".join(done.stdout.split())


@pytest.mark.parametrize("lora", [(), LORA], ids=["all weights", "LoRA"])
def test_a_reward_model_is_a_sequence_classifier(folder: Path, lora: tuple[str, ...]) -> None:
    path = train(folder, "reward", *lora)
    loader: Any = AutoPeftModelForSequenceClassification if lora else AutoModelForSequenceClassification
    model = loader.from_pretrained(path, **({"num_labels": 1} if lora else {})).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    answered = conversation("What is 3?", "It is 3.")
    ids = tokenizer.apply_chat_template(answered, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        (logits,) = model(ids).logits
    ours, own_tokenizer = load_model(str(path), "model", reward=True)
    assert logits.tolist() == pytest.approx(score(ours, own_tokenizer, [answered]), abs=1e-6)
