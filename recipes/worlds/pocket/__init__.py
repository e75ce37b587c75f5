"""The embedded data set, a small world in plain English that is generated from a seed (`python -m recipes.data`)."""
