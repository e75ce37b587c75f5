"""Measure the models of a run: `python -m pipeline evaluate RUN --stage 2_sft`.

`evaluate_yaml` names the data, and `checks` what is wrong with them. `parts` opens them and reads a sample of their
rows, and `held_out` chooses what is read. `stage` measures with `metrics`, `win_rate`, `reward_model`, `baselines` and
`harness`; `intervals` makes the estimates and `results` writes them. Nothing is imported here, so that `--help` stays
fast.
"""
