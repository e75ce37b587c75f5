"""What the project and TRL use of vLLM, on a CPU: an engine that holds a model of transformers and samples from it."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from pipeline.models.kernels.sampler import sample


class SamplingParams(SimpleNamespace):
    """The settings of a request."""


class LLM:
    """An engine, whose weights are those of its folder until others are loaded.

    Its log-probabilities are too high by `sharpened`, as if its kernels were not those of training.
    """

    engines: list[LLM] = []  # noqa: RUF012 - those that a test made
    sharpened = 0.0

    def __init__(self, model: str, **settings: Any) -> None:
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.awake = {"weights", "kv_cache"}
        self.requests: list[SamplingParams] = []
        self.sampled_with: list[dict[str, torch.Tensor]] = []
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace()))
        self.llm_engine.model_executor.driver_worker.model_runner = SimpleNamespace(model=self)
        # An engine in this process seeds torch as well.
        torch.manual_seed(settings.get("seed", 0))
        self.engines.append(self)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        assert "weights" in self.awake
        state = self.model.state_dict()
        for name, weight in weights:
            state[name].copy_(weight)

    def sleep(self, level: int) -> None:
        self.awake = set()
        if level == 2:
            for weight in self.model.parameters():
                weight.data.fill_(math.nan)

    def wake_up(self, tags: list[str]) -> None:
        self.awake |= set(tags)

    def reset_prefix_cache(self) -> None:
        pass

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        assert self.awake == {"weights", "kv_cache"}
        self.sampled_with.append({name: value.clone() for name, value in self.model.state_dict().items()})
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        self.requests += each
        return [self._answer(prompt["prompt_token_ids"], params) for prompt, params in zip(prompts, each, strict=True)]

    def _answer(self, prompt: list[int], params: SamplingParams) -> Any:
        ends = getattr(params, "stop_token_ids", None) or self.model.generation_config.eos_token_id
        config = GenerationConfig(max_new_tokens=params.max_tokens, eos_token_id=ends, do_sample=params.temperature > 0)
        if params.temperature > 0:
            config.update(temperature=params.temperature, min_p=params.min_p)
        seed = getattr(params, "seed", None)
        outputs = []
        for index in range(params.n):
            generator = None if seed is None else torch.Generator().manual_seed(seed + index)
            (ids,) = sample(self.model, [prompt], config, generator)
            logits = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            chosen = (logits / (params.temperature or 1.0)).log_softmax(-1)[range(len(ids)), ids] + self.sharpened
            log_probs = [
                {token: SimpleNamespace(logprob=float(p), rank=1)}
                for token, p in zip(ids, chosen.tolist(), strict=True)
            ]
            outputs.append(SimpleNamespace(token_ids=ids, logprobs=log_probs))
        return SimpleNamespace(prompt_token_ids=prompt, outputs=outputs)


def module() -> ModuleType:
    """Return what `import vllm` is to give."""
    stub = ModuleType("vllm")
    stub.LLM, stub.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    return stub
