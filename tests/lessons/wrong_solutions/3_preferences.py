"""Wrong solutions of the exercises in `3_preferences.ipynb`, which its checks have to notice."""
# ruff: noqa: F811, F821


# %% exercise-1: losses are counted, not wins
def fit_strengths(wins, steps=500):
    votes = wins + wins.T
    p = torch.ones(len(wins))
    for _ in range(steps):
        p = wins.sum(0) / (votes / (p[:, None] + p[None, :])).sum(1)
    strengths = p.log()
    return strengths - strengths.mean()


# %% exercise-1: the shares of won votes, which do not ask how strong the opponents were
def fit_strengths(wins, steps=500):
    shares = wins.sum(1) / (wins + wins.T).sum(1)
    strengths = (shares / (1 - shares)).log()
    return strengths - strengths.mean()


# %% exercise-1: p is returned, not its logarithm
def fit_strengths(wins, steps=500):
    votes = wins + wins.T
    p = torch.ones(len(wins))
    for _ in range(steps):
        p = wins.sum(1) / (votes / (p[:, None] + p[None, :])).sum(1)
    return p - p.mean()


# %% exercise-2: every ratio outside of the range
def is_ignored(ratio, advantage, cliprange=0.2):
    return (ratio - 1).abs() > cliprange


# %% exercise-2: the sign of the advantage is turned around
def is_ignored(ratio, advantage, cliprange=0.2):
    return ((advantage < 0) & (ratio > 1 + cliprange)) | ((advantage > 0) & (ratio < 1 - cliprange))


# %% exercise-2: only the upper end of the range
def is_ignored(ratio, advantage, cliprange=0.2):
    return (advantage > 0) & (ratio > 1 + cliprange)


# %% exercise-3: the first n answers only
def expected_best(scores, n):
    return max(scores[:n])


# %% exercise-3: an answer may be chosen several times
def expected_best(scores, n):
    m = len(scores)
    return sum(s * ((k / m) ** n - ((k - 1) / m) ** n) for k, s in enumerate(sorted(scores), start=1))


# %% exercise-3: sorted from the largest to the smallest
def expected_best(scores, n):
    from math import comb

    ordered = sorted(scores, reverse=True)
    return sum(comb(k - 1, n - 1) * s for k, s in enumerate(ordered, start=1)) / comb(len(scores), n)
