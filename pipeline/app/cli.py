"""`python -m pipeline app RUN`: a page that shows a run, and where people say which answers they prefer.

    python -m pipeline app runs/pocket
    python -m pipeline app runs/pocket --model runs/other/4_grpo --model Qwen/Qwen2.5-0.5B-Instruct
    python -m pipeline app runs/pocket --host 0.0.0.0 --password SECRET

Needs the extra `app`: `pip install -e ".[app]"`.
"""

import argparse
import getpass
import socket
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from pipeline.data.votes import votes_step
from pipeline.errors import Problem, UserError, as_typed, refuse
from pipeline.evaluation.cli import add_trust
from pipeline.evaluation.evaluate_yaml import VOTES
from pipeline.files import check_links, holds_model

LIMITS = {
    "port": (1, 65535),
    "overlap": (0, 1),
    "temperature": (0.0001, 10),
    "min_p": (0, 0.999),
    "max_new_tokens": (1, 1 << 20),
}
"""The smallest and the largest value of each option that is a number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="directory of a run, for instance runs/pocket")
    meaning = "a further model to compare; repeatable"
    parser.add_argument("--model", action="append", default=[], metavar="PATH_OR_ID", help=meaning)
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default: 7860)")
    meaning = "address to listen on (default: 127.0.0.1, this machine only)"
    parser.add_argument("--host", default="127.0.0.1", help=meaning)
    add_trust(parser)
    meaning = "password for visitors, who vote under a name of their choice (asked for if no value is given)"
    parser.add_argument("--password", nargs="?", const="", help=meaning)

    group = parser.add_argument_group("which answer is better?")
    group.add_argument("--pair", nargs="+", metavar="MODEL", help="one or two models to compare first (default: SFT)")
    group.add_argument("--prompts", metavar="DATASET", help="prompts (default: the prompts of the run's stage 3)")
    group.add_argument("--overlap", type=float, default=0.0, help="share of pairs that everyone sees (default: 0)")
    group.add_argument("--guidelines", type=Path, metavar="FILE", help="guidelines for annotators, in Markdown")
    meaning = "for sampling the answers to compare (default: as in the run's step for votes, or"
    group.add_argument("--temperature", type=float, help=f"{meaning} 1)")
    group.add_argument("--min_p", type=float, help=f"{meaning} 0.05)")
    group.add_argument("--max_new_tokens", type=int, help=f"{meaning} 128)")


def main(args: argparse.Namespace) -> int:
    """Show the page until Ctrl-C. Return 0.

    Raises:
        UserError: If a library is missing, the run has no model to show, or an option cannot be used.
    """
    missing = [name for name in ("fastapi", "uvicorn", "krippendorff") if find_spec(name) is None]
    if missing:
        raise UserError(Problem("app", " and ".join(missing), 'is not installed; pip install "fourstage[app]"'))
    if args.password == "":
        args.password = getpass.getpass("Password of the page: ")
    run = Path(args.run)
    # The run's step for votes may name a model that is not a stage of the run.
    voted_on = str(votes_step(run).get("model_name_or_path") or "")
    if voted_on and voted_on not in args.model and not holds_model(run / Path(voted_on).name):
        args.model = [*args.model, voted_on]
    problems = _check_run(run, args.model)
    out_of_range = check_limits(args, LIMITS)
    problems += out_of_range
    if not any(problem.field == "--port" for problem in out_of_range):
        problems += _check_address(args)
    if args.pair and len(args.pair) > 2:
        problems.append(Problem("--pair", " ".join(args.pair), "name one model or two"))
    if args.guidelines and not args.guidelines.is_file():
        problems.append(Problem("--guidelines", args.guidelines, "is not a file; give one in Markdown"))
    problems += check_links(run / VOTES, home=run, field="RUN")
    refuse(*problems)
    print("Loading PyTorch and Transformers ...", flush=True)
    # These imports take seconds, which `--help` does not need.
    from pipeline.app.models import Models
    from pipeline.app.server import serve
    from pipeline.app.site import Site
    from pipeline.config.named_code import only_trusted
    from pipeline.launch import quiet_libraries

    quiet_libraries()
    with only_trusted(args.trust):
        serve(Site(run, Models(run, args.model), args))
    return 0


def _check_run(run: Path, models: Sequence[str]) -> list[Problem]:
    """Report a run that has no model to show; `models` are further ones that the command line names."""
    if not run.is_dir():
        return [Problem("RUN", run, f"no such directory; make it with `{as_typed('run', 'RECIPE')}`")]
    # A run that starts from a model from the Hub has no model of its own while it waits for votes on that model.
    if models or any(map(holds_model, run.glob("[0-9]*_*"))):
        return []
    seeds = sorted(path.parent for path in run.glob("seed*/run.json"))
    if seeds:
        return [Problem("RUN", run, f"holds several runs; name one, such as {seeds[0]}")]
    return [Problem("RUN", run, "has no model of any stage yet")]


def check_limits(args: argparse.Namespace, limits: Mapping[str, tuple[float, float]]) -> list[Problem]:
    """Report the options that are set to a value outside of their range.

    Args:
        args: The parsed command line.
        limits: The smallest and the largest value, by the name of the option without dashes.
    """
    problems = []
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            problems.append(Problem(f"--{name}", value, f"is not between {low} and {high}"))
    return problems


def _check_address(args: argparse.Namespace) -> list[Problem]:
    """Report an address that cannot be used, or that others could open without a password."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)
        # Try the port now: uvicorn would complain only after the models have been loaded.
        with socket.socket(family, kind, protocol) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
    except socket.gaierror:
        return [Problem("--host", args.host, "is not an address of this machine")]
    except OSError as error:
        return [Problem("--port", args.port, f"cannot be used ({error.strerror}); choose another")]
    if args.password == "":
        return [Problem("--password", "nothing", "is empty; give one")]
    if not args.password and not ip_address(str(address[0])).is_loopback:
        return [Problem("--host", args.host, "lets other machines open the page; give a --password as well")]
    return []
