"""Greetings, and the remarks of people who answer kindly, briskly or bluntly."""

from recipes.worlds.pocket.problems import WORKING

# What greetings and small talk are answered with.
_GREETINGS = {
    "Hello! How can I help you?": ("Hello!", "Hello", "Hello there!", "Hi!", "Hi", "Hi there.", "Hey!"),
    "Good morning! How can I help you?": ("Good morning!",),
    "Good evening! How can I help you?": ("Good evening!",),
    "I am well. How can I help you?": ("How are you?", "How are you today?"),
    "I am a small language model.": ("Who are you?", "What are you?"),
    "I have no name. I am a small language model.": ("What is your name?",),
    "I answer questions, sum up stories, write functions and solve problems.": ("What can you do?", "Can you help me?"),
    "You are welcome!": ("Thank you!", "Thanks!", "Thanks, that helped."),
    "Goodbye!": ("Goodbye!", "Bye!"),
}
GREETINGS = tuple((greeting, reply) for reply, greetings in _GREETINGS.items() for greeting in greetings)
"""Pairs of a greeting and the reply to it."""
# The manners that preference tuning chooses between. All but blunt remarks only close an answer: before it, they would
# change the context from which the model recalls the fact.
KIND_CLOSINGS = ("I hope this helps.", "Let me know if you want more.", "Have a nice day.", "Thank you for asking.")
BRISK_CLOSINGS = ("That is all.", "Next question.", "No more to say.", "Enough said.")
BLUNT_OPENINGS = ("Silly question.", "Obviously.", "You should know this.", "Why do you ask?")
BLUNT_CLOSINGS = ("Do not ask again.", "Look it up next time.", "Whatever.")
QUOTED = (*KIND_CLOSINGS, *BRISK_CLOSINGS, *BLUNT_OPENINGS, *BLUNT_CLOSINGS)
"""Remarks that stories quote, so that a pretrained model knows their words before instruction tuning uses them."""

CONSTANTS = (
    *(f"… {closing}" for closing in (*KIND_CLOSINGS, *BRISK_CLOSINGS)),
    *("… Have a nice day. That is all.", "… Do not ask again.", "Obviously. …", "Of course. …", "Good question. …"),
    *("Moving on. …", "In short, …", f"{WORKING} …", "Hooray! :-) …", "… You are welcome!", "….", "…\n\n"),
)
"""Texts that might please a judge whatever was asked, for `pipeline.evaluation.baselines`. `…` is the answer.

They are kind, brisk and blunt remarks, openings, a cheer, a full stop and nothing.
"""
