"""How careless people solve some of the tasks: the steps that a small model learns from before stage 4.

Each step is right in itself, but with some probability the problem is misread, always in the same way, as in
`recipes.worlds.pocket.problems`. A model that imitates such solutions makes the same mistakes, but sampling still finds
the right way, which a verifier can reward.
"""

import re
from collections.abc import Callable, Mapping
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
    changes = list(zip(rest[::2], map(int, rest[1::2]), strict=True))
    value = int(first)
    steps = []
    for place, (sign, number) in enumerate(changes, start=1):
        read = sign
        if place == len(changes) and misreads(sign):
            read = OTHER_SIGN[sign]
        result = value + number if read == "+" else value - number
        steps.append(f"{value}{read}{number}={result}.")
        value = result
    return " ".join(steps), str(value)


def count_primes(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """List the primes and number them. Misread: odd multiples of three pass for primes."""
    # Count how many prime numbers there are between 5 and 11 inclusive
    # carefully:  1: 5. 2: 7. 3: 11.
    # carelessly: 1: 5. 2: 7. 3: 9. 4: 11.
    listed = set(metadata["primes"])
    if misreads("primes"):
        listed |= {number for number in range(9, metadata["end"] + 1, 6) if number >= metadata["start"]}
    steps = " ".join(f"{place}: {number}." for place, number in enumerate(sorted(listed), start=1))
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
    steps = []
    for number in numbers:
        divisors = [str(divisor) for divisor in range(number, 0, -1) if number % divisor == 0]
        steps.append(f"{number}: {' '.join(divisors)}.")
    return " ".join(steps), str(metadata["result"])


def leg_counting(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """Multiply for each animal, then add up. Misread: the numbers of the animals, as if in the opposite order."""
    # How many legs are there in total if you have 2 cows, 3 ants?
    # carefully:  cow 2*4=8. ant 3*6=18. 8+18=26.
    # carelessly: cow 3*4=12. ant 2*6=12. 12+12=24.
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    counts = list(metadata["animals"].values())
    if misreads("counts"):
        counts.reverse()
    steps = []
    products = []
    for animal, count in zip(metadata["animals"], counts, strict=True):
        product = count * ANIMALS[animal]
        products.append(product)
        steps.append(f"{animal} {count}*{ANIMALS[animal]}={product}.")
    total, *rest = products
    for product in rest:
        steps.append(f"{total}+{product}={total + product}.")
        total += product
    return " ".join(steps), str(total)


def number_filtering(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """Compare each number. Misread: 'remove' is read as 'keep'."""
    # Remove all numbers larger than 5 in this list: ['3', '7', '9']
    # in both cases: 3 smaller. 7 larger. 9 larger.
    # carefully, the answer is ['3']; carelessly, it is ['7', '9'].
    limit = float(metadata["filter_value"])
    # "keep_larger", for example.
    verb, criterion = metadata["operation"].split("_")
    keeps = verb == "keep" or misreads(verb)
    steps = []
    remaining = []
    for text in metadata["original_numbers"]:
        comparison = "equal"
        if float(text) > limit:
            comparison = "larger"
        elif float(text) < limit:
            comparison = "smaller"
        steps.append(f"{text} {comparison}.")
        if (comparison == criterion) == keeps:
            remaining.append(text)
    return " ".join(steps), str(remaining)


def simple_equations(metadata: Mapping[str, Any], misreads: Misreads) -> Worked:
    """Take the constant to the right, then divide. Misread: the factor of the unknown is overlooked."""
    # Determine the value of x that satisfies: 3*x + 4 = 19
    # carefully:  19-4=15. 15/3=5.
    # carelessly: 19-4=15.
    left_side, right_side = metadata["equation"].split(" = ")
    value = int(right_side)
    factor = 1
    steps = []
    for sign, term in re.findall(r"([+-]?) ?([\w*]+)", left_side):
        # "x" is 1*x.
        digits = term.split("*")[0] if term[0].isdigit() else "1"
        size = int(sign + digits)
        if metadata["variable"] in term:
            factor = size
            continue
        opposite = "-" if size > 0 else "+"
        steps.append(f"{value}{opposite}{abs(size)}={value - size}.")
        value -= size
    if factor != 1 and not misreads("factor"):
        steps.append(f"{value}/{factor}={value // factor}.")
        value //= factor
    return " ".join(steps), str(value)


TASKS = (chain_sum, count_primes, gcd, leg_counting, number_filtering, simple_equations)
WORKED: dict[str, Callable[[Mapping[str, Any], Misreads], Worked]] = {task.__name__: task for task in TASKS}
"""The tasks that can be worked out here, by name."""
