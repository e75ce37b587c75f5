r"""
# Stage 3: PPO against a reward model

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.ppo --config recipes/pocket/3_ppo.yaml
```

A model from the Hub, with LoRA, with a reward model and a reward function of your own:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.ppo --config recipes/existing-model/3_ppo.yaml \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --reward_model_path runs/qwen/3_reward --reward_funcs my_rewards:brevity --reward_weights 1 0.1 \
    --output_dir runs/qwen/3_ppo
```
"""

from trl import ModelConfig

from pipeline.data.arguments import DataArguments
from pipeline.rl.arguments import PPORewardArguments
from pipeline.rl.ppo_config import PPOConfig
from pipeline.training.custom_trainer import TrainerArguments, load_trainer
from pipeline.training.entry import run


def main(
    data_args: DataArguments,
    reward_args: PPORewardArguments,
    training_args: PPOConfig,
    model_args: ModelConfig,
    trainer_args: TrainerArguments,
) -> None:
    from trl import get_peft_config

    from pipeline.models.adapters import starting_model
    from pipeline.models.kernels.quantized import quantization_config
    from pipeline.rl.arguments import load_rl_inputs
    from pipeline.rl.ppo import PPOTrainer
    from pipeline.tools.loading import load_environment, load_tools
    from pipeline.training.train import run_callbacks, train_and_save

    trainer_class = load_trainer(trainer_args.trainer, PPOTrainer)
    reward_funcs, tokenizer, train_dataset, eval_dataset = load_rl_inputs(
        data_args, reward_args, training_args, model_args
    )
    trainer = trainer_class(
        model=starting_model(model_args, training_args),
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        value_model=reward_args.value_model_path,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization_config(model_args, training_args),
        tools=load_tools(reward_args.tools),
        environment_factory=load_environment(reward_args.environment),
        value_use_peft=reward_args.value_use_peft,
        callbacks=run_callbacks(training_args),
    )
    train_and_save(trainer)


if __name__ == "__main__":
    run(main)
