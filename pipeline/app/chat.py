"""`python -m pipeline chat PATH`: talk with a model in the terminal.

python -m pipeline chat runs/pocket/4_grpo
python -m pipeline chat Qwen/Qwen2.5-0.5B-Instruct --temperature 0.7
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.app.cli import check_limits
from pipeline.errors import Problem, UserError, refuse
from pipeline.evaluation.cli import add_trust

# These imports take seconds, which `--help` does not need.
if TYPE_CHECKING:
    from pipeline.app.models import Loaded, Sampling
    from pipeline.app.prompts import HeldOutPrompt

HELP = """/example KIND  ask a held-out prompt of the run, optionally of a kind such as counting
/stage NAME    continue with another stage of the run, such as 2_sft, or another folder or Hub id
/new           begin a new conversation
/keep          remember the conversation from now on, or, the next time, begin anew with each question
/things        list all things that the run's data are about, if they are pocket's
/help          show these commands
/quit          end (or Ctrl-D); Ctrl-C ends an answer"""
Turns = list[dict[str, Any]]
LIMITS = {"max_new_tokens": (1, 1 << 20), "temperature": (0, 100), "top_p": (0.0001, 1), "top_k": (0, 1 << 20)}
"""The smallest and the largest value of each option."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of a model, for instance runs/pocket/4_grpo")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="total probability of the tokens to sample from")
    parser.add_argument("--top_k", type=int, default=0, help="sample only from this many tokens (default: 0, off)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    add_trust(parser)


def main(args: argparse.Namespace) -> int:
    """Answer the input, typed or piped, line by line until it ends. Return 0."""
    refuse(*check_limits(args, LIMITS))
    from pipeline.config.named_code import only_trusted

    # The files next to a model, such as `arguments.json`, may come with a download.
    with only_trusted(args.trust):
        return talk(args)


def talk(args: argparse.Namespace) -> int:
    """Load the model of `args` and answer each line until the input ends. Return 0."""
    # Bytes that are not UTF-8 become question marks. This must be set before anything is read.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    is_typed = sys.stdin.isatty()
    if is_typed:
        print("Loading PyTorch and the model ...", flush=True)
    from pipeline.app.models import Sampling, load
    from pipeline.app.prompts import loadable_tools
    from pipeline.launch import quiet_libraries

    quiet_libraries()
    loaded = load(args.path, "PATH")
    # With readline, `input` has a history and understands arrow keys.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    run = Path(args.path).parent
    chat = Chat(
        run=run,
        loaded=loaded,
        sampling=Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed),
        tools={},
    )
    chat.greet(is_typed)
    chat.tools = loadable_tools(run)
    prompt = "> " if is_typed else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line.split(" ")[0] in ("/quit", "/exit"):
            return 0
        chat.answer(line)


@dataclass
class Chat:
    """A conversation with a model of a run, and what its commands change.

    Attributes:
        run: Folder of the model; not necessarily a run.
        loaded: The model that answers.
        sampling: How it answers.
        tools: Tools that it may call, from `prompts.loadable_tools`.
        keeps: Whether the model remembers the conversation. A model that was trained on single questions would answer
            a second one with the first one's words.
        messages: The conversation so far.
        examples: Held-out prompts by kind, in the order in which they will be asked; {} until one is asked for.
    """

    run: Path
    loaded: Loaded
    sampling: Sampling
    tools: dict[str, Any]
    keeps: bool = True
    messages: Turns = field(default_factory=list)
    examples: dict[str, list[HeldOutPrompt]] = field(default_factory=dict)

    def greet(self, is_typed: bool) -> None:
        """Say what may be asked if the input `is_typed`, and set whether the model remembers the conversation."""
        from pipeline.app.prompts import asks_single_questions, question_advice

        is_run = (self.run / "run.json").is_file()
        self.keeps = not (is_run and asks_single_questions(self.run))
        if is_typed:
            about = ""
            if is_run:
                advice = "Ask as /example does: the same question in other words may fail."
                about = f" {question_advice(self.run)} {advice}"
            print(f"{self.loaded.name} answers.{about}\nCommands:\n{HELP}")
        if not self.keeps:
            note = "Each question begins anew, as in this run's data; /keep lets the model remember the conversation."
            print(note, file=sys.stdout if is_typed else sys.stderr)

    def answer(self, line: str) -> None:
        """Obey a command, or answer a question; nothing happens for an empty line."""
        command, _, argument = line.partition(" ")
        if command == "/new":
            self.messages = []
        elif command == "/keep":
            self.toggle_memory()
        elif command == "/stage":
            self.change_stage(argument.strip() or ".")
        elif command == "/example":
            self.ask_example(argument.strip())
        elif command == "/things":
            self.list_things()
        elif command.startswith("/"):
            print(HELP)
        elif line:
            if not self.keeps:
                self.messages = []
            question = {"role": "user", "content": line}
            self.messages = reply(self.loaded, [*self.messages, question], self.sampling, self.tools)

    def toggle_memory(self) -> None:
        """Make the model remember the conversation from now on, or begin anew with each question."""
        self.keeps = not self.keeps
        if self.keeps:
            print("The model remembers this conversation; /new begins another.")
        else:
            print("Each question begins anew.")

    def change_stage(self, name: str) -> None:
        """Resume the conversation with another stage of the run, or another folder or Hub id."""
        from pipeline.app.models import load

        folder = self.run / name
        try:
            self.loaded = load(str(folder) if folder.is_dir() else name, "/stage")
        except UserError as error:
            print(*error.problems, sep="\n")
            return
        if self.keeps and self.messages:
            print(f"{self.loaded.name} answers from now on, and knows the conversation so far; /new begins another.")
        else:
            print(f"{self.loaded.name} answers from now on.")

    def ask_example(self, kind: str) -> None:
        """Ask the next held-out prompt of a kind, by default of the first one, and say what the right result is."""
        from pipeline.app.prompts import held_out_prompts

        if not self.examples:
            for prompt in held_out_prompts(self.run):
                self.examples.setdefault(prompt.kind, []).append(prompt)
        if not self.examples:
            print("/example: this model has no held-out prompts to ask")
            return
        if not kind:
            kind = next(iter(self.examples))
        if kind not in self.examples:
            print(Problem("/example", kind, f"choose from: {', '.join(self.examples)}"))
            return
        # The kind that was asked becomes the last one, and the example the last one of its kind.
        example, *later = self.examples.pop(kind)
        self.examples[kind] = [*later, example]
        print(f"Asked: {example.text}")
        self.messages = reply(self.loaded, example.messages, self.sampling, self.tools, example)
        if example.result:
            print(f"The right result is {example.result}.")

    def list_things(self) -> None:
        """List the things that the run's data are about, if they are pocket's."""
        from pipeline.app.prompts import pocket_things

        things = pocket_things(self.run)
        if things:
            print(", ".join(things))
        else:
            print("/things: the data of this model name no such list")


def reply(
    loaded: Loaded, messages: Turns, sampling: Sampling, tools: Mapping[str, Any], prompt: HeldOutPrompt | None = None
) -> Turns:
    """Print the answer to the last of the messages as it is generated. `prompt` is as for `prompts.open_prompt`.

    Return the conversation with the answer, or without the last message if it is too long.
    """
    from pipeline.app.models import ENDED, write
    from pipeline.app.prompts import open_prompt
    from pipeline.report.text import visible

    try:
        dialogue = open_prompt(loaded, messages, tools, prompt)
    except UserError as error:
        earlier_messages = messages[:-1]
        print(*error.problems, "; or /new" if earlier_messages else "", sep="")
        return earlier_messages
    printed = ""
    answer = None
    with contextlib.suppress(KeyboardInterrupt):
        for answer in write(loaded, dialogue.prompt, sampling, dialogue.tools):
            # A turn that may be a call is shown once it is complete, because calls are displayed differently.
            if dialogue.tools and answer.turn and not answer.stopped:
                continue
            text = visible(answer.text, len(answer.text))
            print(text[len(printed) :], end="", flush=True)
            printed = text
    # An answer without a reason to stop was ended by Ctrl-C.
    reason = "stopped"
    if answer is not None and answer.stopped:
        reason = answer.stopped
    print("" if reason == ENDED else f" [{reason}]")
    turns: Turns = [{"role": "assistant", "content": ""}]
    if answer is not None:
        turns = list(answer.messages)
    return [*messages, *({**turn, "content": str(turn.get("content") or "").strip()} for turn in turns)]
