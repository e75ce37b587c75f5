"""
# The tokenizer, trained on the pretraining documents

```bash
python -m recipes.tokenizer --config recipes/pocket/0_tokenizer.yaml
```

On your own text, a file or a folder:

```bash
python -m recipes.tokenizer --config recipes/gsm8k-shakespeare/0_tokenizer.yaml --dataset_name shakespeare.txt
```
"""

import logging
from pathlib import Path

from pipeline.data.arguments import DataArguments
from pipeline.errors import refuse
from pipeline.models.tokenizer import TOKENIZER_FILES, TokenizerArguments
from pipeline.training.entry import run

logger = logging.getLogger("recipes.tokenizer")


def main(args: TokenizerArguments, data_args: DataArguments) -> None:
    from pipeline.data.splits import load_splits
    from pipeline.files import check_replaceable, write_folder
    from pipeline.models.tokenizer import train_tokenizer

    refuse(check_replaceable(args.output_dir, TOKENIZER_FILES))
    dataset, _ = load_splits(data_args, "text", evaluation=False)
    texts = (text for batch in dataset.iter(batch_size=1000) for text in batch["text"])
    tokenizer = train_tokenizer(texts, args.vocab_size, args.algorithm, args.model_max_length, args.tools)
    with write_folder(Path(args.output_dir)) as folder:
        tokenizer.save_pretrained(folder)
    logger.info("tokenizer: %s, %d tokens (limit: %d)", args.algorithm, len(tokenizer), args.vocab_size)


if __name__ == "__main__":
    run(main)
