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

    from pipeline.hub.repositories import Outputs, Repository

MESSAGE = "Push with Fourstage"
"""Message of the commits, and title of the pull requests."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, or, with --repo_id, of one step")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--namespace", metavar="NAME", help="user or organization: push the run to NAME/RUN-STAGE")
    target.add_argument("--repo_id", metavar="NAME/REPO", help="push a single output directory to this repository")
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
    from pipeline.hub.repositories import Outputs

    refuse(*_check(args))
    # The client would log two lines for each request that it repeats.
    logging.set_verbosity_error()
    api = HfApi(library_name="fourstage")
    if args.repo_id and "/" not in args.repo_id and not args.dry_run:
        refuse(*check_access([], "--repo_id"))
        args.repo_id = full_id(args.repo_id, args.run)
    if args.namespace:
        run = Outputs(args.run, namespace=args.namespace, only=args.stage)
    else:
        folder = args.run.absolute()
        run = Outputs(folder.parent, repo_id=args.repo_id, only=[folder.name])
    run.license = args.license
    run.checkpoints = args.checkpoints
    if not args.dry_run:
        run.api = api
    _warn(run, args)
    if args.dry_run:
        _print_files(run.repositories())
        return 0
    # A pull request needs no permission to write.
    if not args.create_pr:
        _check_access(run, args)
    with _explain_failure(str(args.run), args.namespace or args.repo_id):
        repositories = run.repositories()
    for name, base in run.bases.items():
        if name in run.selected and base.repo_id is None:
            message = f"{name} is an adapter of {base.folder.name}, which is not on the Hub: push that as well."
            print(message, file=sys.stderr)
    disable_progress_bars()
    for repository in repositories:
        _push(api, repository, args)
    if args.namespace:
        with _explain_failure(f"The collection {run.name}", args.namespace):
            _add_to_collection(api, run.name, args, repositories)
    return 0


def _warn(run: Outputs, args: argparse.Namespace) -> None:
    """Print on stderr what others will see that the user may not expect: names, a miniature, held-out prompts."""
    from pipeline.hub.repositories import names_of_people

    for name in run.selected:
        if people := names_of_people(run.folders[name]):
            print(f"{run.id_of(name)} contains the names that people voted under: {', '.join(people)}", file=sys.stderr)
    if run.only is None and run.unpublished:
        print(f"not pushed, as a card says `publish: false`: {', '.join(run.unpublished)}", file=sys.stderr)
    if run.is_smoke:
        print(f"{args.run}: {SMOKE}", file=sys.stderr)
    if run.has_report and run.only is None and run.local_data and not args.private:
        rows = f"answers to held-out prompts of {', '.join(run.local_data)}"
        print(f"the report shows {rows}, in a Space that everybody can read; --private hides it", file=sys.stderr)


def _print_files(repositories: list[Repository]) -> None:
    """Print what would be pushed to each branch of each repository, and the totals."""
    sizes: list[int] = []
    for repository in repositories:
        for branch, files in [("", repository.files), *repository.checkpoints.items()]:
            title = f"{repository.type} {repository.id}"
            print(f"{title} (branch {branch})" if branch else title)
            for name, content in sorted(files.items()):
                sizes.append(len(content) if isinstance(content, bytes) else content.stat().st_size)
                print(f"  {sizes[-1]:>12,}  {name}")
    print(f"{len(sizes)} files of {sum(sizes):,} bytes in {len(repositories)} repositories; nothing was pushed")


def _check_access(run: Outputs, args: argparse.Namespace) -> None:
    """Raise a `UserError` if the token may not write to one of the repositories."""
    from pipeline.hub.access import check_access
    from pipeline.hub.repositories import is_data

    option = "--namespace" if args.namespace else "--repo_id"
    data = [run.id_of(name) for name in run.selected if is_data(run.folders[name])]
    models = [run.id_of(name) for name in run.selected if not is_data(run.folders[name])]
    for repo_type, ids in (("dataset", data), ("model", models)):
        # Without ids, only the token would be checked.
        if ids:
            refuse(*check_access(ids, option, repo_type))


def _push(api: HfApi, repository: Repository, args: argparse.Namespace) -> None:
    """Push to a repository and to the branches of its checkpoints, and print a line for each."""
    from pipeline.hub.upload import push

    label = repository.id
    if repository.type != "model":
        label += f" ({repository.type})"
    options: dict[str, Any] = {"repo_type": repository.type, "private": args.private}
    # A pull request is made against main, the default.
    branch = None if args.create_pr else args.revision
    with _explain_failure(label, repository.id):
        changed = push(
            api, repository.id, repository.files, MESSAGE, revision=branch, create_pr=args.create_pr, **options
        )
        _print_result(label, args.revision, changed)
        for branch, files in repository.checkpoints.items():
            changed = push(api, repository.id, files, MESSAGE, **options, revision=branch)
            _print_result(label, branch, changed)


def _print_result(label: str, branch: str | None, changed: bool) -> None:
    """Print whether a push changed anything, such as "alice/pocket-2_sft, branch step-40: up to date"."""
    place = f"{label}, branch {branch}" if branch else label
    print(f"{place}: {'pushed' if changed else 'up to date'}", flush=True)


def _check(args: argparse.Namespace) -> list[Problem]:
    """Return the problems of the options that need no request to the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from pipeline.files import is_locked

    is_run = (args.run / "run.json").exists()
    seeds = sorted(path.parent for path in args.run.glob("seed*/run.json"))
    remedy = ""
    if not args.run.is_dir():
        remedy = f"no such directory; make it with `{as_typed('run', 'RECIPE')}`"
    elif seeds and not is_run:
        remedy = f"contains a run for each seed; push one of them, such as {seeds[0]}"
    elif args.namespace and not is_run:
        remedy = "is not a run (there is no run.json); for a single output directory, give --repo_id NAME/REPO"
    elif any(is_locked(args.run / lock) for lock in ("run.lock", ".lock")):
        remedy = "is being written by another process; wait until it has ended"
    problems = []
    if remedy:
        problems.append(Problem("RUN", args.run, remedy))
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
def _explain_failure(what: str, repo_id: str) -> Iterator[None]:
    """Turn an error of a request in this block into a `RunStopped` that says why `what` was not pushed.

    `repo_id` is the repository, user or organization that the requests are about.
    """
    from pipeline.hub.upload import PUSH_ERRORS, explain

    try:
        yield
    except PUSH_ERRORS as error:
        advice = "Nothing on this disk has changed; the same command continues with what is missing."
        message = f"{what} could not be pushed: {explain(error, repo_id)}.\n{advice}"
        raise RunStopped(message, EXIT_PUSH_FAILED) from error


def _add_to_collection(api: HfApi, title: str, args: argparse.Namespace, repositories: list[Repository]) -> None:
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
        # A token for some repositories only, or somebody else's namespace, is no error if only some stages are pushed,
        # or as pull requests.
        if error.response.status_code != 403 or not (args.stage or args.create_pr):
            raise
        print("The token may not write to collections, so the repositories are not tied together.", file=sys.stderr)
