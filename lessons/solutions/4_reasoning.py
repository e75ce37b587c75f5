"""Solutions of the exercises in 4_reasoning.ipynb."""
# ruff: noqa: E402


# %% exercise-1
def leave_one_out(rewards, num_generations):
    """Return each reward (B,) minus the mean of the other rewards of its group."""
    groups = rewards.view(-1, num_generations)
    mean_of_others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - mean_of_others).flatten()


# %% exercise-2
import re


def strict_answer(text, reference):
    """Return 1.0 if the only announced answer of a text is the reference, and 0.0 otherwise."""
    if text.count("The answer is") != 1:
        return 0.0
    match = re.search(r"The answer is ([^.]*)\.", text)
    return float(match is not None and match[1] == reference)


# %% exercise-3
import math


def pass_at(k, n, correct):
    """Return the share of all sets of k of the n answers that contain at least one right answer."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)
