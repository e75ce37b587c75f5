r"""
# Stage 3: the reward model

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.reward --config recipes/pocket/3_reward.yaml
```

From a model from the Hub, with LoRA, on pairs of the Hub:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.reward --config recipes/existing-model/3_reward.yaml \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/qwen/3_reward
```

The adapter loads with `AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`, and `recipes.ppo`
accepts it as a reward model.
"""

from trl import ModelConfig, RewardConfig

from pipeline.data.arguments import DataArguments
from pipeline.training.custom_trainer import TrainerArguments, load_trainer
from pipeline.training.entry import run
from pipeline.training.optimizer import OptimizerArguments
from pipeline.training.token_loss import TokenLossArguments


def main(
    data_args: DataArguments,
    training_args: RewardConfig,
    model_args: ModelConfig,
    optimizer_args: OptimizerArguments,
    loss_args: TokenLossArguments,
    trainer_args: TrainerArguments,
) -> None:
    from trl import get_peft_config

    from pipeline.models.adapters import starting_model
    from pipeline.models.kernels.quantized import quantization_config
    from pipeline.training.fine_tuning import RewardTrainer, choose_kernels
    from pipeline.training.inputs import load_inputs
    from pipeline.training.optimizer import optimizer_cls_and_kwargs
    from pipeline.training.train import run_callbacks, train_and_save

    trainer_class = load_trainer(trainer_args.trainer, RewardTrainer)
    tokenizer, train_dataset, eval_dataset = load_inputs("preference", data_args, training_args, model_args)
    # With this type, PEFT also trains and saves the score head, which is new.
    model_args.lora_task_type = "SEQ_CLS"
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
    )
    trainer.token_loss_coef = loss_args.token_loss_coef
    choose_kernels(trainer, model_args.attn_implementation)
    train_and_save(trainer)


if __name__ == "__main__":
    run(main)
