"""Measure the models of a run: `python -m pipeline evaluate RUN --stage 2_sft`.

`evaluate_yaml` says on which data, and `held_out` opens these and reads a sample of their rows. `stage` runs the
measurements of `metrics`, `win_rate`, `reward_model`, `baselines` and `harness` on it; `intervals` makes the estimates
and `results` writes them. Nothing is imported here, so that `--help` stays fast.
"""
