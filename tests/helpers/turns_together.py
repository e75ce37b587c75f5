"""Two processes that sample together, of which one calls tools more often: neither may wait for a turn of the other.

`python -m tests.helpers.ranks ... -m tests.helpers.turns_together OUTPUT sharded` shards the weights by FSDP 2, which
the recipes do on GPUs only; `asked` has all processes ask for each turn at once, as TRL does with a server of vLLM.
"""

import sys
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from trl import GRPOConfig

from pipeline.rl.grpo import GRPOTrainer
from tests.helpers import tool_toy as toy


def main(output: str, how: str) -> None:
    args = GRPOConfig(
        output, use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8, num_generations=4,
        max_completion_length=40, max_steps=1, ddp_timeout=30,
    )  # fmt: skip
    rank = args.process_index
    run: Any = GRPOTrainer(
        toy.policy(0.5), toy.says_yes, args,
        train_dataset=toy.prompts(), processing_class=toy.tokenizer(), tools=[toy.double],
    )  # fmt: skip
    run._is_plain = False
    turns: list[int] = []
    single = run._generate_single_turn

    def counted(prompts: Any, *rest: Any, **options: Any) -> Any:
        turns.append(len(prompts))
        if how == "asked":
            distributed.all_gather_object([None, None], len(prompts))
        return single(prompts, *rest, **options)

    run._generate_single_turn = counted
    if how == "sharded":
        run.model = run.model_wrapped = fully_shard(run.model)
    run.model.train()
    torch.manual_seed(3 * rank)
    batch = run._generate_and_score_completions([dict(row) for row in toy.prompts(2).to_list() for _ in range(4)])
    counts: list[Any] = [None, None]
    distributed.all_gather_object(counts, (turns, int((batch["tool_mask"] == 0).sum())))
    if rank == 0:
        print("turns", counts)
        (first, first_results), (second, second_results) = counts
        assert len(first) == len(second) > 2 and first_results != second_results
        assert 1 in (first + second)[1:], "one of them takes part with a text that is thrown away"


if __name__ == "__main__":
    main(*sys.argv[1:])
