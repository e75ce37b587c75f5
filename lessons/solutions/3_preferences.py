"""Solutions of the exercises in `3_preferences.ipynb`."""
# ruff: noqa: E402, F821


# %% exercise-1
def fit_strengths(wins, steps=500):
    """Return the strengths (N,) for wins (N, N): `wins[i, j]` is how often i beat j."""
    votes = wins + wins.T
    p = torch.ones(len(wins))
    for _ in range(steps):
        p = wins.sum(1) / (votes / (p[:, None] + p[None, :])).sum(1)
    strengths = p.log()
    return strengths - strengths.mean()


# %% exercise-2
def is_ignored(ratio, advantage, cliprange=0.2):
    """Return which tokens have no gradient, a boolean tensor of the shape of `ratio`."""
    too_high = (advantage > 0) & (ratio > 1 + cliprange)
    too_low = (advantage < 0) & (ratio < 1 - cliprange)
    return too_high | too_low


# %% exercise-3
from math import comb


def expected_best(scores, n):
    """Return the mean of the best score over all choices of `n` of the list `scores`."""
    total = 0.0
    for k, score_of_answer in enumerate(sorted(scores), start=1):
        total += comb(k - 1, n - 1) * score_of_answer
    return total / comb(len(scores), n)
