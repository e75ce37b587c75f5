"""Measuring the models of a run: generation in batches, grading, metrics with intervals.

The command is `python -m pipeline evaluate RUN --stage 2_sft`.
Nothing is imported here, so that `--help` stays fast.
"""
