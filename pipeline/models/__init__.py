"""Importing this registers the reward model and the critic of a Llama 4 with the Auto classes of transformers."""

from pipeline.models import classifiers as classifiers
