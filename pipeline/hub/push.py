"""`python -m pipeline push RUN --namespace NAME`: push the outputs of a run to the Hub.

    python -m pipeline push runs/pocket --namespace alice
    python -m pipeline push runs/pocket --namespace alice --stage 4_grpo --private
    python -m pipeline push runs/pocket --namespace alice --dry-run
    python -m pipeline push runs/mine/2_sft --repo_id alice/mine

A second push uploads only what has changed, and deletes all other files in the repository except for checkpoints. The
last form pushes a single output directory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import EXIT_PUSH_FAILED, Problem, RunStopped, as_typed, refuse
from pipeline.stages import SMOKE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from pipeline.hub.repositories import Repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, or, with --repo_id, of one step")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--namespace", metavar="NAME", help="user or organization: push the run to NAME/RUN-STAGE")
    where.add_argument("--repo_id", metavar="NAME/REPO", help="push a single output directory to this repository")
    meaning = "push only these stages or data sets, by the names of their directories (default: all, and the report)"
    parser.add_argument("--stage", nargs="+", metavar="STAGE", help=meaning)
    parser.add_argument("--private", action="store_true", help="make the repositories private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if needed (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open pull requests instead of writing to main")
    meaning = "licence of the models and data, such as apache-2.0 (default: the one in the card of the data)"
    parser.add_argument("--license", metavar="ID", help=meaning)
    meaning = "also push the weights of each checkpoint, to a branch such as step-1000"
    parser.add_argument("--checkpoints", action="store_true", help=meaning)
    parser.add_argument("--dry-run", action="store_true", help="list what would be pushed, without making any request")


def main(args: argparse.Namespace) -> int:
    """Push a run, or print what would be pushed. Return the exit code."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging

    from pipeline.hub.access import check_access, full_id
    from pipeline.hub.repositories import Outputs, is_data, names_of_people
    from pipeline.hub.upload import push

    refuse(*_check(args))
    # The client would log two lines for each request that it repeats.
    logging.set_verbosity_error()
    api = HfApi(library_name="fourstage")
    if args.repo_id and "/" not in args.repo_id and not args.dry_run:
        refuse(*check_access([], "--repo_id"))
        args.repo_id = full_id(args.repo_id, args.run)
    run = Outputs(
        path=args.run if args.namespace else args.run.absolute().parent,
        namespace=args.namespace or "",
        repo_id=args.repo_id or "",
        only=args.stage if args.namespace else [args.run.absolute().name],
        license=args.license,
        checkpoints=args.checkpoints,
        api=None if args.dry_run else api,
    )
    for name in run.wanted:
        if people := names_of_people(run.folders[name]):
            print(f"{run.id_of(name)} contains the names that people voted under: {', '.join(people)}", file=sys.stderr)
    if run.is_smoke:
        print(f"{args.run}: {SMOKE}", file=sys.stderr)
    if run.has_report and run.only is None and run.own_data and not args.private:
        what = f"answers to held-out prompts of {', '.join(run.own_data)}"
        print(f"the report shows {what}, in a Space that everybody can read; --private hides it", file=sys.stderr)
    if args.dry_run:
        planned = run.repositories()
        sizes: list[int] = []
        for item in planned:
            for branch, files in [("", item.files), *item.checkpoints.items()]:
                print(f"{item.type} {item.id}{f' (branch {branch})' if branch else ''}")
                for name, content in sorted(files.items()):
                    sizes.append(len(content) if isinstance(content, bytes) else content.stat().st_size)
                    print(f"  {sizes[-1]:>12,}  {name}")
        print(f"{len(sizes)} files of {sum(sizes):,} bytes in {len(planned)} repositories; nothing was pushed")
        return 0
    for kind in () if args.create_pr else ("dataset", "model"):
        if ids := [run.id_of(name) for name in run.wanted if is_data(run.folders[name]) == (kind == "dataset")]:
            refuse(*check_access(ids, "--namespace" if args.namespace else "--repo_id", kind))
    with _stop_if_it_fails(str(args.run), args.namespace or args.repo_id):
        repositories = run.repositories()
    for name, (base, base_id) in run.bases.items():
        if name in run.wanted and base_id is None:
            print(f"{name} is an adapter of {base.name}, which is not on the Hub: push that as well.", file=sys.stderr)
    disable_progress_bars()
    for item in repositories:
        where = f"{item.id} ({item.type})" if item.type != "model" else item.id
        options: dict[str, Any] = {"repo_type": item.type, "private": args.private}
        with _stop_if_it_fails(where, item.id):
            for branch, files in [(args.revision, item.files), *item.checkpoints.items()]:
                is_pull = args.create_pr and files is item.files
                options |= {"revision": None if is_pull else branch, "create_pr": is_pull}
                changed = push(api, item.id, files, "Push with Fourstage", **options)
                to = f"{where}, branch {branch}" if branch else where
                print(f"{to}: {'pushed' if changed else 'up to date'}", flush=True)
    if args.namespace:
        with _stop_if_it_fails(f"The collection {run.name}", args.namespace):
            _collect(api, run.name, args, repositories)
    return 0


def _check(args: argparse.Namespace) -> list[Problem]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from pipeline.files import is_locked

    is_run = (args.run / "run.json").exists()
    seeds, remedy = sorted(path.parent for path in args.run.glob("seed*/run.json")), ""
    if not args.run.is_dir():
        remedy = f"no such directory; make it with `{as_typed('run', 'RECIPE')}`"
    elif seeds and not is_run:
        remedy = f"contains a run for each seed; push one of them, such as {seeds[0]}"
    elif args.namespace and not is_run:
        remedy = "is not a run (there is no run.json); for a single output directory, give --repo_id NAME/REPO"
    elif any(is_locked(args.run / lock) for lock in ("run.lock", ".lock")):
        remedy = "is being written by another process; wait until it has ended"
    problems = [Problem("RUN", args.run, remedy)] if remedy else []
    if args.create_pr and args.revision not in (None, "main"):
        problems.append(Problem("--create-pr", args.revision, "pull requests are made against main; omit --revision"))
    if args.repo_id and args.stage:
        problems.append(Problem("--stage", " ".join(args.stage), "is for whole runs; omit it"))
    try:
        validate_repo_id(args.repo_id or f"{args.namespace}/run")
    except HFValidationError:
        field, value = ("--repo_id", args.repo_id) if args.repo_id else ("--namespace", args.namespace)
        problems.append(Problem(field, value, "is not a name on the Hub; give letters, digits, '-', '_' and '.'"))
    return problems


@contextmanager
def _stop_if_it_fails(what: str, repo_id: str) -> Iterator[None]:
    from pipeline.hub.upload import PUSH_ERRORS, explain

    try:
        yield
    except PUSH_ERRORS as error:
        advice = "Nothing on this disk has changed; the same command continues with what is missing."
        message = f"{what} could not be pushed: {explain(error, repo_id)}.\n{advice}"
        raise RunStopped(message, EXIT_PUSH_FAILED) from error


def _collect(api: HfApi, title: str, args: argparse.Namespace, repositories: list[Repository]) -> None:
    """Add the repositories to the collection of the run, which is created if it does not exist."""
    from huggingface_hub.errors import HfHubHTTPError

    from pipeline.hub.upload import retry

    def attempt() -> str:
        # The Hub allows titles of 60 characters.
        slug = api.create_collection(title[:60], namespace=args.namespace, private=args.private, exists_ok=True).slug
        for item in repositories:
            api.add_collection_item(slug, item.id, item.type, exists_ok=True)
        return slug

    try:
        print(f"collection: {retry(attempt)}")
    except HfHubHTTPError as error:
        # The token is limited to some repositories, or the namespace belongs to someone else.
        if error.response.status_code != 403 or not (args.stage or args.create_pr):
            raise
        print("The token may not write to collections, so the repositories are not tied together.", file=sys.stderr)
