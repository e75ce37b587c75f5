r"""
# Stage 2: instruction tuning

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.sft --config recipes/pocket/2_sft.yaml
```

A model from the Hub, with LoRA:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.sft --config recipes/existing-model/2_sft.yaml
```

Another one, without LoRA, on a data set with question and answer columns:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.sft --config recipes/existing-model/full/2_sft.yaml \
    --dataset_name openai/gsm8k --dataset_config main \
    --prompt_column question --completion_column answer --output_dir runs/gsm8k/2_sft
```
"""

from trl import ModelConfig, SFTConfig

from pipeline.data.arguments import DataArguments
from pipeline.training.custom_trainer import TrainerArguments, load_trainer
from pipeline.training.entry import run
from pipeline.training.optimizer import OptimizerArguments


def main(
    data_args: DataArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    optimizer_args: OptimizerArguments,
    trainer_args: TrainerArguments,
) -> None:
    from trl import get_peft_config

    from pipeline.data.tokenized import log_truncated
    from pipeline.models.adapters import starting_model
    from pipeline.models.kernels.quantized import quantization_config
    from pipeline.training.fine_tuning import SFTTrainer
    from pipeline.training.inputs import load_inputs
    from pipeline.training.optimizer import optimizer_cls_and_kwargs
    from pipeline.training.train import run_callbacks, train_and_save

    trainer_class = load_trainer(trainer_args.trainer, SFTTrainer)
    tokenizer, train_dataset, eval_dataset = load_inputs("conversation", data_args, training_args, model_args)
    log_truncated(train_dataset, training_args)
    trainer = trainer_class(
        model=starting_model(model_args, training_args),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization_config(model_args, training_args),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(training_args, optimizer_args),
        callbacks=run_callbacks(training_args),
        attn_implementation=model_args.attn_implementation,
    )
    train_and_save(trainer)


if __name__ == "__main__":
    run(main)
