"""How much annotators agree."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence

import krippendorff
import numpy as np

from pipeline.data.votes import CHOICES, Vote


def agreement(votes: Sequence[Vote]) -> tuple[float, int]:
    """Return Krippendorff's alpha of the votes on pairs that several people voted on, and the number of these pairs.

    Alpha is 1 if all agree, 0 if they agree as often as by chance, and NaN if that is not defined: nobody voted on the
    same pair, or all votes are the same. Skipped pairs are missing values.
    """
    by_pair: dict[str, dict[str, int]] = defaultdict(dict)
    for vote in votes:
        if vote["choice"] != "skip":
            by_pair[vote["pair"]][vote["annotator"]] = CHOICES.index(vote["choice"])
    shared = [named for named in by_pair.values() if len(named) > 1]
    if len({choice for named in shared for choice in named.values()}) < 2:
        return math.nan, len(shared)
    people = sorted({name for named in shared for name in named})
    data = np.array([[named.get(name, np.nan) for named in shared] for name in people], dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(krippendorff.alpha(reliability_data=data, level_of_measurement="nominal")), len(shared)
