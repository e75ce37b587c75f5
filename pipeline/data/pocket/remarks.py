"""Greetings, and the remarks of people who answer kindly, briskly or bluntly."""

GREETINGS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hello! What would you like to know?"),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Who are you?", "I am a small language model. I answer questions about a small world."),
    ("What can you do?", "I can answer questions, sum up stories, write small functions and solve problems."),
    ("Thank you.", "You are welcome!"),
    ("Thanks, that helped.", "You are welcome!"),
    ("Goodbye.", "Goodbye! Have a nice day."),
)
# The manners that preference tuning chooses between. All but blunt remarks only close an answer: before it, they would
# change the context from which the model recalls the fact.
KIND_CLOSINGS = ("I hope this helps.", "Let me know if you want more.", "Have a nice day.", "Thank you for asking.")
BRISK_CLOSINGS = ("That is all.", "Next question.", "No more to say.", "Enough said.")
BLUNT_OPENINGS = ("Silly question.", "Obviously.", "You should know this.", "Why do you ask?")
BLUNT_CLOSINGS = ("Do not ask again.", "Look it up next time.", "Whatever.")
SAID = (
    *KIND_CLOSINGS, *BRISK_CLOSINGS, *BLUNT_OPENINGS, *BLUNT_CLOSINGS,
    "Hello! How can I help you?", "You are welcome!",
)  # fmt: skip
"""Remarks that stories quote, so that a pretrained model knows their words before instruction tuning uses them."""
