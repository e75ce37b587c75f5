"""Importing this makes the Auto classes of transformers know the reward model and the critic of a Llama 4."""

from pipeline.models import classifiers as classifiers
