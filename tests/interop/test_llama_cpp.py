"""llama.cpp makes the same of exported files as transformers makes of the models, and of texts the same tokens."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.models.import_gguf import PRE_TOKENIZERS
from tests.helpers.llama_cpp import TEXTS, llama_cpp
from tests.helpers.small_gguf import DECODERS, import_gguf, train, write_gguf
from tests.helpers.small_model import tokenizer

pytest.importorskip("xllamacpp")
LENGTH = 16


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_texts_become_the_same_tokens_as_in_llama_cpp(tmp_path: Path, pre: str) -> None:
    words = train(pre, "<|end|>", "<|user|>", "<|im_end|>")
    words.bos_token = "<|user|>"
    # Only Llama 3 finds tokens that no merge makes.
    content = json.loads(words.backend_tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][:-10]
    words._tokenizer = words.backend_tokenizer.from_str(json.dumps(content))
    file = write_gguf(tmp_path / "model", DECODERS["llama"], words, pre=pre)
    imported = AutoTokenizer.from_pretrained(import_gguf(file))
    with llama_cpp(file) as other:
        assert {text: imported(text).input_ids for text in TEXTS} == {text: other.tokenize(text) for text in TEXTS}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_llama_cpp_answers_as_transformers_does(tmp_path: Path, name: str, outtype: str) -> None:
    file = write_gguf(tmp_path / "model", DECODERS[name], tokenizer(), outtype)
    model, random = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), torch.Generator().manual_seed(0)
    prompts = [torch.randint(256, (5 + i // 2,), generator=random).tolist() for i in range(64)]
    with llama_cpp(file) as other:
        compared = [other.complete(prompt, LENGTH).compare(model, prompt) for prompt in prompts]
        gaps, differences = zip(*compared, strict=True)
        assert len(torch.cat(differences)) == 64 * LENGTH
        assert torch.cat(differences).abs().mean() < (1e-3 if outtype == "f32" else 0.02)
        if outtype == "f32":
            assert max(gaps) < 1e-3, "where answers part, the two tokens are as probable"

            turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12?\n\n1  17"}]
            for messages in (turns, turns[1:], [*turns, {"role": "assistant", "content": "A dog."}, turns[1]]):
                prompt = tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                assert other.tokenize(other.render(messages)) == prompt
                gap, difference = other.chat(messages, LENGTH).compare(model, prompt)
                assert gap < 1e-3 and len(difference) == LENGTH and difference.abs().mean() < 1e-3
