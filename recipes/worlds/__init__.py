"""Worlds: data that are generated from a seed, who judges answers about them, and what may be asked.

They are content, like the YAML files of a scale. `pipeline/` does not import them. Its tables name what is built in,
such as the reward `hidden_taste`, and import it when it is used.
"""
