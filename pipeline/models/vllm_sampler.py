"""vLLM on GPUs: whether it can be used, and a sampler for evaluations. TRL's trainers use vLLM on their own."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.import_utils import is_vllm_available

from pipeline import hardware
from pipeline.models.generation import Completion, end_tokens

LENGTH_THAT_FITS = -1
"""Value of `max_model_len` that makes vLLM use as many of a model's positions as fit into memory.

By default, vLLM does not start unless a text of full length fits: 131,072 tokens in many small models."""


def validate_vllm() -> str | None:
    """Return why vLLM cannot sample on this machine and what to do about it, or None if it can."""
    if not is_vllm_available():
        return "vLLM is not installed; pip install 'fourstage[vllm]', or omit this"
    if hardware.accelerator() in (None, "mps"):
        return "vLLM needs a GPU (CUDA or XPU), and none was found; omit this"
    return None


@dataclass
class VLLMSampler:
    """Samples from a model like `pipeline.models.generation.generate`: the same distribution, other random numbers.

    vLLM starts with the first call, in the model's precision at that time, and loads it from a temporary folder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def _engine(self) -> Any:
        from vllm import LLM

        with TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            dtype = str(self.model.dtype).removeprefix("torch.")
            # The model and its opponent each have a sampler, and their PyTorch weights are in memory as well.
            return LLM(model=folder, dtype=dtype, gpu_memory_utilization=0.4, max_model_len=LENGTH_THAT_FITS)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        samples: int = 1,
        temperature: float = 0.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> list[list[Completion]]:
        """Return `samples` completions of each prompt; the arguments are the same as for `generation.generate`."""
        from vllm import SamplingParams

        ends = end_tokens(self.model, self.tokenizer)
        seeds = random.Random(seed)
        common: dict[str, Any] = {
            "n": samples,
            "temperature": temperature,
            "min_p": min_p,
            "max_tokens": max_new_tokens,
            "stop_token_ids": ends,
            "detokenize": False,
        }
        # vLLM adds the number of the sample to the seed of its prompt.
        settings = [SamplingParams(**common, seed=seeds.randrange(2**32)) for _ in prompts]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        completions = []
        for request in self._engine.generate(inputs, sampling_params=settings, use_tqdm=False):
            tokens = [list(output.token_ids) for output in request.outputs]
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            answers = []
            for text, ids in zip(texts, tokens, strict=True):
                stopped = not set(ends).isdisjoint(ids)
                answers.append(Completion(text.strip(), ids, stopped))
            completions.append(answers)
        return completions
