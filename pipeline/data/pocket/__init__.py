"""The embedded data set: a small world in plain English, generated from a seed (`python -m recipes.data`)."""
