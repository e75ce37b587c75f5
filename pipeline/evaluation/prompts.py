"""The ten prompts that every stage answers, to show side by side what each has learned."""

FIXED_PROMPTS: tuple[str, ...] = (
    "What is an LLM?",
    "Can you explain what a fox is?",
    "I would like to know where to find a piano.",
    "Can you say what a hedgehog does?",
    "I would like to know how big a lion is.",
    "Can you tell me something about a tokenizer?",
    "Can you summarise this in one sentence? One day Anna was in the garden. There Anna drew a rose. You "
    "know a rose by its thorns. In the evening Anna told Ben everything.",
    "I would like a function add_7 that adds 7 to a number.",
    "Sam has 42 coins. Sam finds 8 coins. Sam sells 3 coins. Sam gets 5 coins. "
    "How many coins does Sam have now?",
    "Anna is taller than Ben. Carl is taller than Anna. Ben is taller than Dana. Who is the tallest?",
)
"""Greedy answers to these are in `evaluations/<stage>.json`, the first one first."""
