"""
# Stage 0: the untrained model, with random weights

```bash
python -m recipes.untrained --config recipes/pocket/1_pretrain.yaml --output_dir runs/pocket/0_random
```

Write the model that `recipes.pretrain` starts from with the same file: the same fields, seed and weights.
"""

from pipeline.data.arguments import DataArguments
from pipeline.models.scratch import ScratchArguments, build_model, log_model
from pipeline.training.entry import run
from pipeline.training.optimizer import OptimizerArguments
from pipeline.training.pretraining import PretrainConfig


def main(
    data_args: DataArguments,
    training_args: PretrainConfig,
    model_args: ScratchArguments,
    optimizer_args: OptimizerArguments,
) -> None:
    from pipeline.models.loading import load_tokenizer

    tokenizer = load_tokenizer(data_args.tokenizer_name_or_path, "tokenizer_name_or_path")
    model = build_model(model_args, tokenizer, training_args.seed)
    log_model(model)
    model.save_pretrained(training_args.output_dir)
    tokenizer.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    run(main)
