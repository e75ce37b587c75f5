"""`python -m pipeline app RUN`: a page that shows a run, and on which people say which answers they prefer.

    python -m pipeline app runs/pocket
    python -m pipeline app runs/pocket --model runs/other/4_grpo --model Qwen/Qwen2.5-0.5B-Instruct
    python -m pipeline app runs/pocket --host 0.0.0.0 --password SECRET

Needs the extra `app`: `pip install -e ".[app]"`.
"""

from __future__ import annotations

import argparse
import getpass
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from pipeline.errors import Problem, UserError

LOCAL = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `app` to `parser`."""
    parser.add_argument("run", metavar="RUN", help="directory of a run, for instance runs/pocket")
    parser.add_argument(
        "--model", action="append", default=[], metavar="PATH_OR_ID", help="a further model to compare; repeatable"
    )
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default: 7860)")
    parser.add_argument("--host", default=LOCAL, help=f"address to listen on (default: {LOCAL}, this machine alone)")
    parser.add_argument(
        "--password",
        nargs="?",
        const="",
        help="what visitors must know, who also give a name, under which they vote; asked for if it is not given here",
    )
    add_prefer_arguments(parser)


def add_prefer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the section Prefer to `parser`."""
    group = parser.add_argument_group("which answer is better?")
    group.add_argument("--pair", nargs="+", metavar="MODEL", help="one or two models to compare first (default: SFT)")
    group.add_argument("--prompts", metavar="DATASET", help="prompts (default: those of the run's stage 3)")
    group.add_argument("--prompts_config", metavar="CONFIG", help="configuration of that data set")
    group.add_argument("--overlap", type=float, default=0.0, help="share of pairs that everybody sees (default: 0)")
    group.add_argument("--guidelines", type=Path, metavar="FILE", help="guidelines for annotators, in Markdown")
    group.add_argument("--goal", type=int, metavar="N", help="votes to collect, of which the page shows the share")
    meaning = "of the answers to compare (default: that of the run's step for votes, or"
    group.add_argument("--temperature", type=float, help=f"{meaning} 1)")
    group.add_argument("--min_p", type=float, help=f"{meaning} 0.05)")
    group.add_argument("--max_new_tokens", type=int, help=f"{meaning} 128)")


def _check_prefer(args: argparse.Namespace) -> list[Problem]:
    """Check what can be seen of the arguments before anything is loaded."""
    problems = []
    if not 0 <= args.overlap <= 1:
        problems.append(Problem("--overlap", args.overlap, "must be between 0 and 1"))
    if args.temperature is not None and not 0 < args.temperature <= 10:
        problems.append(Problem("--temperature", args.temperature, "must be above 0, so that answers differ"))
    if args.min_p is not None and not 0 <= args.min_p < 1:
        problems.append(Problem("--min_p", args.min_p, "must be at least 0 and below 1"))
    for name in ("max_new_tokens", "goal"):
        if (value := getattr(args, name)) is not None and value < 1:
            problems.append(Problem(f"--{name}", value, "must be at least 1"))
    if args.pair and len(args.pair) > 2:
        problems.append(Problem("--pair", " ".join(args.pair), "name one model or two"))
    if args.guidelines and not args.guidelines.is_file():
        problems.append(Problem("--guidelines", args.guidelines, "is not a file; give one in Markdown"))
    return problems


def main(args: argparse.Namespace) -> int:
    """Show the page until Ctrl-C. Return 0.

    Raises:
        UserError: If RUN is not a run, the extra is not installed, the port is taken, or others could open the page
            without a password.
    """
    if missing := [name for name in ("gradio", "krippendorff") if find_spec(name) is None]:
        raise UserError(Problem("app", " and ".join(missing), 'is not installed; pip install "fourstage[app]"'))
    if args.password == "":
        args.password = getpass.getpass("Password of the page: ")
    problems = [problem for problem in (_check_run(Path(args.run), args.model), _check_address(args)) if problem]
    problems += _check_prefer(args)
    if problems:
        raise UserError(*problems)

    from datasets import disable_progress_bars
    from transformers.utils import logging

    from pipeline.app.models import Models
    from pipeline.app.server import serve
    from pipeline.app.site import Site

    disable_progress_bars()
    logging.disable_progress_bar()
    run = Path(args.run)
    serve(Site(run, Models(run, args.model), args))
    return 0


def _check_run(run: Path, others: Sequence[str] = ()) -> Problem | None:
    """Report a folder that is not a run; one that starts from a model of the Hub may have to name it by `--model`."""
    if not run.is_dir():
        return Problem("RUN", run, "no such directory; make it with `python -m pipeline run RECIPES`")
    if not others and not any(run.glob("[0-9]*_*/config.json")):
        seeds = sorted(path.parent.name for path in run.glob("seed*/run.json"))
        remedy = f"holds several runs; name one, such as {run / seeds[0]}" if seeds else "has no model of any stage yet"
        return Problem("RUN", run, remedy)
    return None


def _check_address(args: argparse.Namespace) -> Problem | None:
    """Report a port or an address that cannot be used, and a page that others could open without a password."""
    if not 1 <= args.port <= 65535:
        return Problem("--port", args.port, "is not between 1 and 65535")
    try:
        addresses = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = addresses[0]
        with socket.socket(family, kind, protocol) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
    except socket.gaierror:
        return Problem("--host", args.host, "is not an address of this machine")
    except OSError as error:
        return Problem("--port", args.port, f"cannot be used ({error.strerror}); choose another")
    if args.password == "":
        return Problem("--password", "nothing", "is empty; give one")
    if not args.password and not ip_address(str(address[0])).is_loopback:
        return Problem("--host", args.host, "lets other machines open the page; give a --password as well")
    return None
