r"""
# Stage 1: pretraining, from random weights

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.pretrain --config recipes/pocket/1_pretrain.yaml
```

On your own text, a file or a folder, with the tokenizer that `recipes.tokenizer` trains on it:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.pretrain \
    --config recipes/gsm8k-shakespeare/1_pretrain.yaml --dataset_name shakespeare.txt
```

On a stream from the Hub, or on the shards that `recipes.shards` makes of it (`--dataset_name shards/tinystories`). Each
process reads its own files, and a resumed run goes on where the stream was:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.pretrain \
    --config recipes/gsm8k-shakespeare/1_pretrain.yaml \
    --dataset_name roneneldan/TinyStories --dataset_streaming --max_steps 10000 --output_dir runs/tinystories/1_pretrain
```
"""

from pipeline.data.arguments import DataArguments
from pipeline.models.scratch import ScratchArguments, build_model, log_model
from pipeline.training.custom_trainer import TrainerArguments, load_trainer
from pipeline.training.entry import run
from pipeline.training.optimizer import OptimizerArguments
from pipeline.training.pretraining import PretrainConfig


def main(
    data_args: DataArguments,
    training_args: PretrainConfig,
    model_args: ScratchArguments,
    optimizer_args: OptimizerArguments,
    trainer_args: TrainerArguments,
) -> None:
    from pipeline.data.packing import PackedBlocks
    from pipeline.data.streams import pack_splits
    from pipeline.training.inputs import load_inputs
    from pipeline.training.optimizer import optimizer_cls_and_kwargs
    from pipeline.training.pretraining import PretrainTrainer, adapt_to_machine, bits_per_byte, sequence_losses
    from pipeline.training.train import run_callbacks, train_and_save

    trainer_class = load_trainer(trainer_args.trainer, PretrainTrainer)
    tokenizer, *documents = load_inputs("text", data_args, training_args, model_args)
    model = build_model(model_args, tokenizer, training_args.seed)
    log_model(model)
    train_dataset, eval_dataset = pack_splits(documents, tokenizer, training_args, data_args)
    adapt_to_machine(training_args, model, train_dataset)
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=PackedBlocks(tokenizer.bos_token_id, tokenizer.eos_token_id),
        compute_metrics=lambda prediction: bits_per_byte(tokenizer, prediction),
        preprocess_logits_for_metrics=sequence_losses,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(training_args, optimizer_args),
        callbacks=run_callbacks(training_args),
        router_losses=(model_args.router_aux_loss_coef or 0.0, model_args.router_z_loss_coef or 0.0),
    )
    train_and_save(trainer)


if __name__ == "__main__":
    run(main)
