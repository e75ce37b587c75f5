"""The ten prompts that every stage answers, to show side by side what each has learned."""

FIXED_PROMPTS: tuple[str, ...] = (
    "What is an LLM?",
    "Can you explain what a fox is?",
    "I would like to know where to find a piano.",
    "Can you say what a hedgehog does?",
    "I would like to know how big a lion is.",
    "Can you tell me something about a tokenizer?",
    "Can you summarise this in one sentence? One day Ana was in the park. There Ana drew a rose. "
    "You know a rose by sharp thorns. In the evening Ana told Ben everything.",
    "I would like a function add_7 that adds 7 to a number.",
    "Sam has 14 coins. Sam finds 6 coins. Sam sells 3 coins. Sam gets 5 coins. How many are left?",
    "Ana outruns Ben. Carl outruns Ana. Who is the fastest?",
)
"""Greedy answers to these are in `evaluations/<stage>.json`, the first one first."""
