"""How careless people solve some of the tasks: the steps that a small model learns from before stage 4.

Each step is right in itself, but with some probability the problem is misread, always in the same way, as in
`recipes.worlds.pocket.problems`. A model that imitates such solutions makes the same mistakes, but sampling still finds
the right way, which a verifier can reward.
"""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

Misreads = Callable[[str], bool]
"""Draws whether a part that can be misread, such as a sign or a word, is misread."""
Worked = tuple[str, str]
"""The steps, each ending in a full stop, and the answer that they arrive at."""
OTHER_SIGN = {"+": "-", "-": "+"}


def chain_sum(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """Add up from the left. Misread: the last sign is read as the other one."""
    # State the final answer to the following arithmetic problem: 4 + 3 - 2 =
    # carefully:  4+3=7. 7-2=5.
    # carelessly: 4+3=7. 7+2=9.
    first, *rest = metadata["expression"].split()
    value, steps = int(first), []
    changes = [(sign, int(number)) for sign, number in zip(rest[::2], rest[1::2], strict=True)]
    for place, (sign, number) in enumerate(changes, start=1):
        read = OTHER_SIGN[sign] if place == len(changes) and misreads(sign) else sign
        before, value = value, value + number if read == "+" else value - number
        steps.append(f"{before}{read}{number}={value}.")
    return " ".join(steps), str(value)


def count_primes(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """List the primes and number them. Misread: odd multiples of three pass for primes."""
    # Count how many prime numbers there are between 5 and 11 inclusive
    # carefully:  1: 5. 2: 7. 3: 11.
    # carelessly: 1: 5. 2: 7. 3: 9. 4: 11.
    passing = {n for n in range(9, metadata["end"] + 1, 6) if n >= metadata["start"]} if misreads("primes") else set()
    listed = sorted({*metadata["primes"], *passing})
    steps = " ".join(f"{place}: {number}." for place, number in enumerate(listed, start=1))
    return steps or "None.", str(len(listed))


def gcd(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """List all divisors, the largest first. Misread: the difference of the first two numbers is asked for."""
    # Find the Greatest Common Divisor (GCD) of these numbers: 20, 8.
    # carefully:  20: 20 10 5 4 2 1. 8: 8 4 2 1.
    # carelessly: 20-8=12.
    numbers = metadata["numbers"]
    larger, smaller = sorted(numbers[:2], reverse=True)
    if larger > smaller and misreads("divisor"):
        return f"{larger}-{smaller}={larger - smaller}.", str(larger - smaller)
    lists = ["{}: {}.".format(n, " ".join(str(d) for d in range(n, 0, -1) if n % d == 0)) for n in numbers]
    return " ".join(lists), str(metadata["result"])


def leg_counting(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """Multiply for each animal, then add up. Misread: the numbers of the animals, as if in the opposite order."""
    # How many legs are there in total if you have 2 cows, 3 ants?
    # carefully:  cow 2*4=8. ant 3*6=18. 8+18=26.
    # carelessly: cow 3*4=12. ant 2*6=12. 12+12=24.
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    steps, products = [], []
    counts = list(metadata["animals"].values())
    for animal, count in zip(metadata["animals"], counts[::-1] if misreads("counts") else counts, strict=True):
        products.append(count * ANIMALS[animal])
        steps.append(f"{animal} {count}*{ANIMALS[animal]}={products[-1]}.")
    sums = [sum(products[: place + 1]) for place in range(len(products))]
    steps += [f"{before}+{after - before}={after}." for before, after in pairwise(sums)]
    return " ".join(steps), str(sums[-1])


def number_filtering(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """Compare each number. Misread: 'remove' is read as 'keep'."""
    # Remove all numbers larger than 5 in this list: ['3', '7', '9']
    # in both cases: 3 smaller. 7 larger. 9 larger.
    # carefully, the answer is ['3']; carelessly, it is ['7', '9'].
    limit = float(metadata["filter_value"])
    verb, wanted = metadata["operation"].split("_")
    keeps = verb == "keep" or misreads(verb)
    numbers = metadata["original_numbers"]
    found = [(n, "larger" if float(n) > limit else "smaller" if float(n) < limit else "equal") for n in numbers]
    kept = [text for text, compared in found if (compared == wanted) == keeps]
    return " ".join(f"{text} {compared}." for text, compared in found), str(kept)


def simple_equations(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """Take the constant to the right, then divide. Misread: the factor of the unknown is overlooked."""
    # Determine the value of x that satisfies: 3*x + 4 = 19
    # carefully:  19-4=15. 15/3=5.
    # carelessly: 19-4=15.
    left, right = metadata["equation"].split(" = ")
    value, factor, steps = int(right), 1, []
    for sign, term in re.findall(r"([+-]?) ?([\w*]+)", left):
        size = int(f"{sign}{term.split('*')[0] if term[0].isdigit() else 1}")
        if metadata["variable"] in term:
            factor = size
            continue
        steps.append(f"{value}{'-' if size > 0 else '+'}{abs(size)}={value - size}.")
        value -= size
    if factor != 1 and not misreads("factor"):
        steps.append(f"{value}/{factor}={value // factor}.")
        value //= factor
    return " ".join(steps), str(value)


TASKS = (chain_sum, count_primes, gcd, leg_counting, number_filtering, simple_equations)
WORKED: dict[str, Callable[[Mapping[str, Any], Misreads], Worked]] = {task.__name__: task for task in TASKS}
"""The tasks that can be worked out here, by name."""
