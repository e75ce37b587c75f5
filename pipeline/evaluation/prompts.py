"""The ten prompts that every stage answers, to show side by side what each has learned."""

FIXED_PROMPTS: tuple[str, ...] = (
    "What is an LLM?",
    "What colour is a fox?",
    "Where do you find a piano?",
    "Tell me about the sun.",
    "What does a bee do?",
    "Can you summarise this in one sentence? Tom went to the market to buy a red hat. It rained all day, and "
    "the market was closed. He walked home and read a book.",
    "Write a Python function that adds 3 to a number.",
    "Sam has 12 apples. Sam buys 5 apples. Sam gives away 3 apples. Sam finds 4 apples. "
    "How many apples does Sam have now?",
    "Anna is taller than Ben. Ben is taller than Cara. Who is the tallest?",
    "Who are you?",
)
"""Greedy answers to these are in `evaluations/<stage>.json`, the first one first."""
