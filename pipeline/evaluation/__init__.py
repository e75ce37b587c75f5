"""Measuring the models of a run: generation in batches, grading, metrics with intervals.

`python -m pipeline evaluate RUN --stage 2_sft` is the command; the metrics are in `pipeline.evaluation.metrics`.
Nothing is imported here, so that `--help` stays fast.
"""
