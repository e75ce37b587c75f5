"""llama.cpp itself: the server of the package xllamacpp, in this process."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from transformers import PreTrainedModel

TEXTS = [
    "\n\n1",
    "  17",
    " 17\n",
    "a1b22c333",
    "3.14159 ½ ²³ Ⅷ ٣٤ １２ 𝟙𝟚",
    " \n \n\n \t\t \r\n\r\n",
    "I'LL we'll 'tis don't",
    "naïve e\u0301 日本語 नमस्ते 👩‍👩‍👧 🏳️‍🌈",
    "\u00a0nbsp\u2003em\u3000ideographic\u2028line\u0085next",
    "\x01\x7f\ufeff",
    "def f(x):\n    return x[1:] != {'a': 12}  # ok\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|user|>hi<|end|>",
    "<|im_",
]
"""What tokenizers split in different ways."""


@dataclass
class Answer:
    """What llama.cpp answered greedily.

    Attributes:
        tokens: Generated ids, including the one that ended the answer.
        log_probs: Their log-probabilities, of shape (T,).
    """

    tokens: list[int]
    log_probs: torch.Tensor

    def compare(self, model: PreTrainedModel, prompt: Sequence[int]) -> tuple[float, torch.Tensor]:
        """Compare an answer with what transformers' model makes of the same prompt.

        Returns:
            By how much its most probable token exceeds llama.cpp's where they part, as logits: 0 if they are the same
            tokens. And its log-probabilities of llama.cpp's tokens, less llama.cpp's, of shape (T,).
        """
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *self.tokens]])).logits[0, len(prompt) - 1 : -1]
        model_log_probs = logits.log_softmax(-1)
        chosen = model_log_probs.gather(1, torch.tensor(self.tokens)[:, None])[:, 0]
        # After the first other token, the two continue different texts.
        parting = (model_log_probs.amax(-1) - chosen).tolist()
        return next((gap for gap in parting if gap > 0), 0.0), chosen - self.log_probs


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, server: Any) -> None:
        self.address = server.listening_address

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with the special tokens that it spells and a bos token if the file asks for it."""
        return self._post("tokenize", {"content": text, "parse_special": True, "add_special": True})["tokens"]

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as text, followed by the generation prompt."""
        return self._post("apply-template", {"messages": messages})["prompt"]

    def complete(self, prompt: Sequence[int], length: int) -> Answer:
        """Continue token ids, up to a token that ends the answer."""
        body = {"prompt": list(prompt), "n_predict": length, "temperature": 0.0, "n_probs": 1, "cache_prompt": False}
        return _answer(self._post("completion", body).get("completion_probabilities", []))

    def chat(self, messages: list[dict[str, str]], length: int) -> Answer:
        """Answer a conversation, as a client of OpenAI's protocol asks for it."""
        body = {"messages": messages, "max_tokens": length, "temperature": 0.0, "logprobs": True, "cache_prompt": False}
        return _answer(self._post("v1/chat/completions", body)["choices"][0]["logprobs"]["content"])

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urlopen(Request(f"{self.address}/{route}", content, headers)) as response:
            return json.load(response)


def _answer(steps: list[dict[str, Any]]) -> Answer:
    return Answer([step["id"] for step in steps], torch.tensor([step["logprob"] for step in steps]))


@contextmanager
def llama_cpp(file: Path, context: int = 512) -> Iterator[LlamaCpp]:
    """Load a GGUF file, and stop the server at the end."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = str(file), context, 1, 1
    params.warmup, params.verbosity = False, -1
    # By default, it attends in half precision, which changes log-probabilities by up to 0.004.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    try:
        yield LlamaCpp(server)
    finally:
        del server
