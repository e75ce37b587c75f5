"""The library behind the recipes, and the command `python -m pipeline`."""

__version__ = "0.1.0"
