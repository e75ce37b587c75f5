"""
# LitGPT's pretraining step against `recipes.pretrain`

```bash
python -m tests.benchmarks.pretrain_vs_litgpt --run runs/pocket
```

Both train a Llama of the same size (4.4M parameters) on the same packed documents, with AdamW, gradient clipping and
the same precision. Ours is the recipe itself, with its data loading, logs and document masks. LitGPT's is the step of
its `pretrain.py` on batches in memory, without document masks, which it does not have. LitGPT's pretraining compiles
the model, so ours does too (`--no_compile`: neither does). They run in turn, each time in a new process. LitGPT is
installed without its dependencies into a separate folder, and shares torch with ours.

Prints the tokens per second of each turn (the median of its steps), and the ratio: the median over the turns, the
lowest and the highest.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("litgpt==0.5.13", "lightning==2.6.*", "lightning-utilities", "torchmetrics", "jsonargparse")
WARM_UP = 10
"""Steps that are not measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/pocket"), help="run with data and tokenizer")
    add("--output", type=Path, default=Path("runs/benchmarks/pretrain_vs_litgpt"))
    add("--turns", type=int, default=5)
    add("--steps", type=int, default=40, help="steps of a turn; the first 10 are not measured")
    add("--batch_size", type=int, default=8)
    add("--block_size", type=int, default=512)
    add("--hidden_size", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--no_compile", action="store_true")
    add("--litgpt", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.litgpt:
        print(json.dumps(litgpt_step_seconds(args)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Train in turn, and print the speeds and their ratio."""
    environment = install(args.output / "environment")
    tokens = args.batch_size * args.block_size
    ratios = []
    for turn in range(args.turns):
        # Whoever begins may find a cooler or less busy machine.
        order = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
        speeds = {side.__name__: tokens / statistics.median(side(args, environment)) for side in order}
        ratios.append(speeds["ours"] / speeds["theirs"])
        print(
            f"ours {speeds['ours']:,.0f}  LitGPT {speeds['theirs']:,.0f} tokens/s  ratio {ratios[-1]:.2f}", flush=True
        )
    print(f"ratio {statistics.median(ratios):.2f} (median of {args.turns}; {min(ratios):.2f} to {max(ratios):.2f})")


def install(folder: Path) -> Path:
    """Install LitGPT, and what its model imports, into a folder, unless it is already installed there."""
    if not (folder / "litgpt").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *PACKAGES], check=True)
    return folder.resolve()


def ours(args: argparse.Namespace, environment: Path) -> list[float]:
    """Return the seconds of each step of the recipe."""
    folder = args.output / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    options = {
        "dataset_name": args.run / "data",
        "tokenizer_name_or_path": args.run / "tokenizer",
        "block_size": args.block_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": args.block_size,
        "use_muon": False,
        "torch_compile": not args.no_compile,
        "per_device_train_batch_size": args.batch_size,
        "max_steps": args.steps,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "output_dir": folder,
    }
    command = [sys.executable, "-m", "recipes.pretrain", "--config", "recipes/pocket/1_pretrain.yaml"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    return [args.batch_size * args.block_size / speed for speed in speeds[WARM_UP:]]


def theirs(args: argparse.Namespace, environment: Path) -> list[float]:
    """Return the seconds of each of LitGPT's steps, from a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.pretrain_vs_litgpt", *sys.argv[1:], "--litgpt"]
    path = os.pathsep.join([str(environment), str(ROOT)])
    done = subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def litgpt_step_seconds(args: argparse.Namespace) -> list[float]:
    """Take steps as LitGPT's `pretrain.py` does, and return the seconds of each."""
    import torch
    from datasets import Dataset, load_dataset
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy
    from transformers import AutoTokenizer

    from pipeline import hardware, launch
    from pipeline.data.packing import pack_documents

    launch.prepare_process()
    tokenizer = AutoTokenizer.from_pretrained(args.run / "tokenizer")
    documents = load_dataset(str(args.run / "data"), "pretrain", split="train")
    blocks = pack_documents(documents, tokenizer, args.block_size + 1, "text")
    assert isinstance(blocks, Dataset)
    config = Config(
        block_size=args.block_size,
        vocab_size=len(tokenizer),
        padded_vocab_size=len(tokenizer),
        n_layer=args.layers,
        n_head=args.heads,
        n_embd=args.hidden_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=64 * -(-args.hidden_size * 8 // (3 * 64)),
    )
    model = GPT(config)
    print(
        f"LitGPT: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}M parameters", file=sys.stderr
    )
    model.max_seq_length = args.block_size
    if not args.no_compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
    device = hardware.accelerator() or "cpu"
    model.to(device)
    bf16 = hardware.precision().value == "bf16"
    seconds = []
    for batch in blocks.with_format("torch").shuffle(seed=0).iter(args.batch_size, drop_last_batch=True):
        begin = time.perf_counter()
        ids = batch["input_ids"].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = model(ids[:, :-1].contiguous())
            loss = chunked_cross_entropy(logits, ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - begin)
        if len(seconds) == args.steps:
            break
    return seconds[WARM_UP:]


if __name__ == "__main__":
    main()
