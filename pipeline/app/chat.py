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
/stage NAME    go on with another stage of the run, such as 2_sft, or another folder or Hub id
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
    from pipeline.rewards.loading import only_trusted

    # The files next to a model, such as `arguments.json`, may come with a download.
    with only_trusted(args.trust):
        return talk(args)


def talk(args: argparse.Namespace) -> int:
    """Load the model of `args` and answer each line until the input ends. Return 0."""
    # Bytes that are not UTF-8 become question marks. This must be set before anything is read.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    typed = sys.stdin.isatty()
    if typed:
        print("Loading PyTorch and the model ...", flush=True)
    from pipeline.app.models import Sampling, load
    from pipeline.app.prompts import (
        asks_single_questions,
        held_out_prompts,
        loadable_tools,
        things_to_ask,
        what_may_be_asked,
    )
    from pipeline.launch import quiet_libraries

    quiet_libraries()
    loaded = load(args.path, "PATH")
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    # With readline, `input` has a history and understands arrow keys.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    run = Path(args.path).parent
    is_run = (run / "run.json").is_file()
    # A model that was trained on single questions answers a second one with the first one's words.
    keeps = not (is_run and asks_single_questions(run))
    if typed:
        advice = "Ask as /example does: the same question in other words may fail."
        about = f" {what_may_be_asked(run)} {advice}" if is_run else ""
        print(f"{loaded.name} answers.{about}\nCommands:\n{HELP}")
    if not keeps:
        note = "Each question begins anew, as in this run's data; /keep lets the model remember the conversation."
        print(note, file=sys.stdout if typed else sys.stderr)
    called = loadable_tools(run)
    examples: dict[str, list[HeldOutPrompt]] = {}
    messages: Turns = []
    while True:
        try:
            line = input("> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return 0
        if command == "/new":
            messages = []
        elif command == "/keep":
            keeps = not keeps
            print(
                "The model remembers this conversation; /new begins another." if keeps else "Each question begins anew."
            )
        elif command == "/stage":
            name = rest.strip() or "."
            try:
                loaded = load(str(run / name) if (run / name).is_dir() else name, "/stage")
                knows = ", and knows the conversation so far; /new begins another." if keeps and messages else "."
                print(f"{loaded.name} answers from now on{knows}")
            except UserError as error:
                print(*error.problems, sep="\n")
        elif command == "/example":
            if not examples:
                for prompt in held_out_prompts(run):
                    examples.setdefault(prompt.kind, []).append(prompt)
            kind = rest.strip() or next(iter(examples), "")
            if kind in examples:
                example, *others = examples.pop(kind)
                examples[kind] = [*others, example]
                print(f"Asked: {example.text}")
                messages = reply(loaded, example.messages, sampling, called, example)
                if example.result:
                    print(f"The right result is {example.result}.")
            elif examples:
                print(Problem("/example", kind, f"choose from: {', '.join(examples)}"))
            else:
                print("/example: this model has no held-out prompts to ask")
        elif command == "/things":
            print(", ".join(things_to_ask(run)) or "/things: the data of this model name no such list")
        elif command.startswith("/"):
            print(HELP)
        elif line:
            if not keeps:
                messages = []
            messages = reply(loaded, [*messages, {"role": "user", "content": line}], sampling, called)


def reply(
    loaded: Loaded, asked: Turns, sampling: Sampling, called: Mapping[str, Any], found: HeldOutPrompt | None = None
) -> Turns:
    """Print the answer as it is generated. Return the conversation with it, or without a last turn that is too long."""
    from pipeline.app.models import ENDED, write
    from pipeline.app.prompts import open_prompt
    from pipeline.report.text import visible

    try:
        opened = open_prompt(loaded, asked, called, found)
    except UserError as error:
        print(*error.problems, "; or /new" if asked[1:] else "", sep="")
        return asked[:-1]
    shown, answer = "", None
    with contextlib.suppress(KeyboardInterrupt):
        for answer in write(loaded, opened.prompt, sampling, opened.tools):
            # A turn that may be a call is shown once it is complete, because calls are displayed differently.
            if opened.tools and answer.turn and not answer.stopped:
                continue
            text = visible(answer.text, len(answer.text))
            print(text[len(shown) :], end="", flush=True)
            shown = text
    # An answer without a reason to stop was ended by Ctrl-C.
    stopped = (answer and answer.stopped) or "stopped"
    print("" if stopped == ENDED else f" [{stopped}]")
    turns = answer.messages if answer else [{"role": "assistant", "content": ""}]
    return [*asked, *({**turn, "content": str(turn.get("content") or "").strip()} for turn in turns)]
