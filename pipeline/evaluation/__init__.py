"""Measure the models of a run: `python -m pipeline evaluate RUN --stage 2_sft`.

`stage` runs the measurements of `metrics`, `matches`, `reward_model` and `baselines` on the data of `held_out`;
`intervals` makes the estimates and `results` writes them. Nothing is imported here, so that `--help` stays fast.
"""
