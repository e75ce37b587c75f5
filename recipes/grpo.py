r"""
# Stage 4: reasoning, by reinforcement learning with verifiable rewards (GRPO)

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.grpo --config recipes/pocket/4_grpo.yaml
```

A model from the Hub on GSM8K, whose answers end in "#### 72", with LoRA, and with vLLM to sample on GPUs:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.grpo --config recipes/existing-model/4_grpo.yaml \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_vllm --output_dir runs/gsm8k/4_grpo
```

The control experiment, which shuffles the reference answers among the prompts. It must not get better:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.grpo --config recipes/pocket/4_grpo.yaml \
    --shuffle_answers --output_dir runs/pocket-control/4_grpo
```
"""

from trl import GRPOConfig, ModelConfig

from pipeline.data.arguments import DataArguments
from pipeline.rl.arguments import GRPORewardArguments
from pipeline.training.custom_trainer import TrainerArguments, load_trainer
from pipeline.training.entry import run


def main(
    data_args: DataArguments,
    reward_args: GRPORewardArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    trainer_args: TrainerArguments,
) -> None:
    from trl import get_peft_config

    from pipeline.models.adapters import starting_model
    from pipeline.models.kernels.quantized import quantization_config
    from pipeline.rl.arguments import load_rl_inputs
    from pipeline.rl.grpo import GRPOTrainer
    from pipeline.tools.loading import load_environment, load_tools
    from pipeline.training.train import run_callbacks, train_and_save

    trainer_class = load_trainer(trainer_args.trainer, GRPOTrainer)
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
        peft_config=get_peft_config(model_args),
        quantization_config=quantization_config(model_args, training_args),
        tools=load_tools(reward_args.tools),
        environment_factory=load_environment(reward_args.environment),
        callbacks=run_callbacks(training_args),
    )
    train_and_save(trainer)


if __name__ == "__main__":
    run(main)
