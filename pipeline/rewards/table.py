"""The built-in rewards, which of them are neither trained on nor used to grade answers, and short names of graders."""

REWARDS = {
    "math_answer": "pipeline.rewards.functions:math_answer",
    "exact_answer": "pipeline.rewards.functions:exact_answer",
    "any_answer": "pipeline.rewards.functions:any_answer",
    "choice": "pipeline.rewards.functions:choice",
    "answer_format": "pipeline.rewards.functions:answer_format",
    "call_cost": "pipeline.rewards.functions:call_cost",
    "code_tests": "pipeline.rewards.functions:code_tests",
    "reasoning_gym": "pipeline.rewards.functions:reasoning_gym",
    "hidden_taste": "recipes.worlds.pocket.annotators:hidden_taste",
}
"""Built-in rewards: the name in YAML files -> the function, which `pipeline.rewards.loading` imports."""

MEASURED_ONLY = ("hidden_taste",)
"""Rewards that may not be trained on: their weight must be 0."""

NO_VERDICT = ("answer_format", "call_cost", "hidden_taste")
"""Rewards where 1 does not mean that the answer is right, so they do not grade held-out problems."""

GRADES = {"exact": "exact_answer", "any": "any_answer", "math": "math_answer", "choice": "choice", "code": "code_tests"}
"""Short names of rewards that grade answers, for `grade` in evaluate.yaml."""
