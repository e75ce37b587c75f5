"""The ten prompts that every stage answers, to show side by side what each has learned."""

FIXED_PROMPTS: tuple[str, ...] = (
    "What is an LLM?",
    "Can you explain what a fox is?",
    "I would like to know where to find a piano.",
    "Can you say what a hedgehog does?",
    "I would like to know how big a lion is.",
    "Can you tell me something about a tokenizer?",
    "Can you summarise this in one sentence? It was warm. One day Julia painted a hedgehog in the park. "
    "Carl had never painted a hedgehog. You know a hedgehog by sharp spines. Carl found Julia in the park.",
    "I would like a function add_7 that adds 7 to a number.",
    "Sam has 14 coins. Sam finds 5 coins. Sam sells 3 coins. Sam gets 4 coins. How many are left?",
    "Greta has children of ages 3, 2, 9, 1, 6. Which age comes third?",
)
"""Greedy answers to these are in `evaluations/<stage>.json`, the first one first."""
