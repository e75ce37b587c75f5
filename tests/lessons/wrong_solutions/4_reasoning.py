"""Mistakes that the checks in 4_reasoning.ipynb have to notice."""
# ruff: noqa: E402, F811


# %% exercise-1: the mean includes the attempt itself
def leave_one_out(rewards, num_generations):
    groups = rewards.view(-1, num_generations)
    return (groups - groups.mean(1, keepdim=True)).flatten()


# %% exercise-1: the sum of the others is divided by all
def leave_one_out(rewards, num_generations):
    groups = rewards.view(-1, num_generations)
    return (groups - (groups.sum(1, keepdim=True) - groups) / num_generations).flatten()


# %% exercise-1: the others of the whole batch
def leave_one_out(rewards, num_generations):
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


# %% exercise-2: the reference is anywhere
def strict_answer(text, reference):
    return float(reference in text)


# %% exercise-2: the last announced answer counts
def strict_answer(text, reference):
    return float(text.split("The answer is")[-1].split(".")[0].strip() == reference)


# %% exercise-2: the announcement only begins with the reference
def strict_answer(text, reference):
    return float(text.count("The answer is") == 1 and f"The answer is {reference}" in text)


# %% exercise-3: answers are put back
import math


def pass_at(k, n, correct):
    return 1 - (1 - correct / n) ** k


# %% exercise-3: the probability that all are right
import math


def pass_at(k, n, correct):
    return math.comb(correct, k) / math.comb(n, k)


# %% exercise-3: k times the share of right answers
import math


def pass_at(k, n, correct):
    return min(1.0, k * correct / n)
