"""The library that the recipes use, and the command `python -m pipeline`."""

__version__ = "0.1.0"
