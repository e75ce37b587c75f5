"""What makes training and sampling fast, mostly on a CPU. Nothing else depends on how it is done.

Each module computes what a library computes as well, in less time. A test shows that the two agree, and the module can
be removed together with the line that asks for it.

| module | stands in for | asked for in | test |
| --- | --- | --- | --- |
| `sampler` | `model.generate` | `models/generation.py`, `rl/grpo.py` | `models/kernels/test_sampler.py` |
| `attention` | torch's attention with a mask | `training/`, recipe reward | `models/kernels/test_attention.py` |
| `packed_rows` | TRL's collator of packed conversations | `training/fine_tuning.py` | `recipes/test_sft.py` |
| `output_layer` | TRL's fused output layer | `training/fine_tuning.py` | `models/kernels/test_output_layer.py` |
| `log_probs` | TRL's output layer and padding | `rl/grpo.py`, `rl/critic.py` | `models/kernels/test_log_probs.py` |
| `length_groups` | one pass of a classifier | recipe reward, `rl/rewards.py` | `models/kernels/test_length_groups.py` |
| `muon` | torch's `Muon`, matrix by matrix | `training/optimizer.py` | `training/test_optimizer.py` |
"""
