"""Speed, disk and memory of packing beside what `tokenizers` alone does with the same texts.

    python -m tests.benchmarks.preparation runs/pocket

packs the documents of a run several times over, with 1 and 4 times as many, and prints for each: tokens a second, the
share of the speed of `encode_batch_fast`, bytes a token in the cache file, and the growth of memory.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Collect the anonymous memory of this process, in bytes: pages of files that are mapped do not count."""
    process, done, seen = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.05):
            memory = process.memory_info()
            seen.append(memory.rss - memory.shared)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--documents", type=int, default=100_000, help="Repeated, if the run has fewer.")
    parser.add_argument("--dataset_num_proc", type=int, default=None)
    args = parser.parse_args()
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()

    from datasets import concatenate_datasets, load_dataset
    from transformers import AutoTokenizer

    from pipeline.data.packing import pack_documents

    tokenizer = AutoTokenizer.from_pretrained(args.run / "tokenizer")
    once = load_dataset(str(args.run / "data"), "pretrain", split="train")
    for number in (args.documents, 4 * args.documents):
        documents = concatenate_datasets([once] * (1 + number // len(once))).select(range(number))
        with peak_memory() as memory:
            begin, processor = time.perf_counter(), time.process_time()
            blocks = pack_documents(documents, tokenizer, 512, "text", args.dataset_num_proc)
            ours, processor_ours = time.perf_counter() - begin, time.process_time() - processor
        tokens = 512 * len(blocks)
        begin, processor = time.perf_counter(), time.process_time()
        for batch in documents.iter(1000):
            tokenizer.backend_tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        alone, processor_alone = time.perf_counter() - begin, time.process_time() - processor
        size = sum(Path(file["filename"]).stat().st_size for file in blocks.cache_files)
        print(
            json.dumps(
                {
                    "tokens": tokens,
                    "tokens_per_second": round(tokens / ours),
                    "share_of_tokenizers": round(alone / ours, 2),
                    "share_by_processor_time": round(processor_alone / processor_ours, 2),
                    "bytes_per_token": round(size / tokens, 3),
                    "memory_mib": round(max(memory) / 2**20),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
