r"""
# Stage 4: reasoning, by reinforcement learning with verifiable rewards (GRPO)

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.grpo --config recipes/pocket/4_grpo.yaml
```

On GSM8K, whose answers end in "#### 72", with LoRA, and with vLLM to sample on GPUs:

```bash
accelerate launch --config_file accelerate_config.yaml -m recipes.grpo --config recipes/pocket/4_grpo.yaml \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft --lora_target_modules all-linear --use_vllm \
    --dataset_name openai/gsm8k --dataset_config main --dataset_test_split test --prompt_column question \
    --answer_pattern '####\s*(.+)' --reward_funcs math_answer answer_format --reward_weights 1.0 0.1 \
    --max_completion_length 512 --output_dir runs/gsm8k/4_grpo
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
from pipeline.training.entry import run


def main(
    data_args: DataArguments,
    reward_args: GRPORewardArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
) -> None:
    from trl import get_peft_config

    from pipeline.models.loading import model_init_kwargs
    from pipeline.rl.arguments import load_rl_inputs
    from pipeline.rl.grpo import GRPOTrainer
    from pipeline.training.train import run_callbacks, train_and_save

    reward_funcs, tokenizer, train_dataset, eval_dataset = load_rl_inputs(
        data_args, reward_args, training_args, model_args
    )
    training_args.model_init_kwargs = model_init_kwargs(model_args)
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=run_callbacks(training_args),
    )
    train_and_save(trainer, data_args, model_args)


if __name__ == "__main__":
    run(main)
