"""
# Shards: the pretraining documents, tokenized beforehand with datatrove, on this machine or on a cluster

```bash
python -m recipes.shards --dataset_name roneneldan/TinyStories --tokenizer_name_or_path runs/pocket/tokenizer \
    --output_dir shards/tinystories
```

On a cluster with Slurm, as an array of jobs, one for each file of the data set:

```bash
python -m recipes.shards --dataset_name HuggingFaceFW/fineweb-edu --dataset_config sample-100BT \
    --tokenizer_name_or_path runs/base/tokenizer --output_dir shards/fineweb-edu --executor slurm --partition cpu
```

The same command goes on where it was stopped. A data set with an evaluation split takes the command once more, with
`--dataset_train_split validation` and the same folder. Pretraining reads the shards as a stream, and trains on the
tokens that it would make of the documents themselves: `--dataset_name shards/tinystories --dataset_streaming`.
"""

from pipeline.data.arguments import DataArguments
from pipeline.data.shard_writer import ShardArguments
from pipeline.errors import refuse
from pipeline.training.entry import run


def main(data_args: DataArguments, args: ShardArguments) -> None:
    from pipeline.data.shard_writer import write_shards
    from pipeline.models.checks import check_tokenizer
    from pipeline.models.loading import load_tokenizer

    name = data_args.tokenizer_name_or_path
    field = "tokenizer_name_or_path"
    tokenizer = load_tokenizer(name, field)
    refuse(*check_tokenizer(tokenizer, field, str(name), chat=False))
    write_shards(tokenizer, data_args, args)


if __name__ == "__main__":
    run(main)
