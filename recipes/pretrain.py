"""
# Stage 1: pretraining, from random weights

On a CPU, one GPU, or with `--num_processes N` on N GPUs:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.pretrain --config recipes/pocket/1_pretrain.yaml
```

On your own text (a file, a folder, or a data set on the Hub, which may be streamed):

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.pretrain --config recipes/pocket/1_pretrain.yaml \
    --dataset_name shakespeare.txt --output_dir runs/shakespeare/1_pretrain
```
"""

from pipeline.arguments import DataArguments, parse
from pipeline.errors import exit_on_user_error
from pipeline.model import LlamaArguments
from pipeline.pretraining import PretrainConfig


def main(data_args: DataArguments, training_args: PretrainConfig, model_args: LlamaArguments) -> None:
    from transformers import AutoTokenizer, Trainer, default_data_collator

    from pipeline.data import load_splits
    from pipeline.model import build_model, log_model
    from pipeline.packing import pack_documents
    from pipeline.pretraining import bits_per_byte, compile_if_it_pays, sequence_losses
    from pipeline.training import run_callbacks, train_and_save

    tokenizer = AutoTokenizer.from_pretrained(data_args.tokenizer_name_or_path)
    model = build_model(model_args, tokenizer, training_args.seed)
    log_model(model)

    # Documents, packed into full blocks
    splits = load_splits(data_args, "text", evaluation=training_args.eval_strategy != "no")
    train_dataset, eval_dataset = (
        split and pack_documents(split, tokenizer, training_args.block_size, "text") for split in splits
    )

    compile_if_it_pays(training_args, model, train_dataset)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=bits_per_byte(tokenizer),
        preprocess_logits_for_metrics=sequence_losses,
        callbacks=run_callbacks(training_args),
    )
    train_and_save(trainer, data_args)


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse(DataArguments, PretrainConfig, LlamaArguments))
