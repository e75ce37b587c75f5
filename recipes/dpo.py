r"""
# Stage 3: preference tuning by direct preference optimization (DPO), without a reward model

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.dpo --config recipes/pocket-dpo/3_dpo.yaml
```

A model from the Hub, with LoRA, on pairs of the Hub, with another loss of TRL:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.dpo \
    --config recipes/existing-model/dpo/3_dpo.yaml --loss_type ipo \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/qwen/3_dpo
```

It reads what `recipes.reward` reads: pairs of `recipes.preferences`, people's votes, and your own.
"""

from trl import ModelConfig

from pipeline.data.arguments import DataArguments
from pipeline.training.custom_trainer import TrainerArguments, load_trainer
from pipeline.training.entry import run
from pipeline.training.preference_config import DPOConfig


def main(
    data_args: DataArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    trainer_args: TrainerArguments,
) -> None:
    from trl import get_peft_config

    from pipeline.models.adapters import starting_model
    from pipeline.models.kernels.quantized import quantization_config
    from pipeline.training.fine_tuning import DPOTrainer
    from pipeline.training.inputs import load_inputs
    from pipeline.training.train import run_callbacks, train_and_save

    trainer_class = load_trainer(trainer_args.trainer, DPOTrainer)
    tokenizer, train_dataset, eval_dataset = load_inputs("preference", data_args, training_args, model_args)
    trainer = trainer_class(
        model=starting_model(model_args, training_args),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization_config(model_args, training_args),
        callbacks=run_callbacks(training_args),
        attn_implementation=model_args.attn_implementation,
    )
    train_and_save(trainer)


if __name__ == "__main__":
    run(main)
