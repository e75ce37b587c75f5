"""What a run pushes to the Hub: checkpoints while it trains, and the model once it is complete on the disk.

This replaces the pushes of transformers, which create the repository before training begins, include pickles and lock
files, and end the run with an error before its model is saved completely if the last push fails.
"""

import hashlib
import json
import logging
import os
import shlex
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, suppress_progress_bars

from pipeline.errors import EXIT_PUSH_FAILED, RunStopped
from pipeline.files import MANIFEST, STATE, read_json
from pipeline.hub.access import full_id
from pipeline.hub.download import LAST
from pipeline.hub.published_files import Files, local_paths, public_content, publishable
from pipeline.hub.repositories import Outputs
from pipeline.hub.upload import explain, is_replaced, push

logger = logging.getLogger(__name__)

# Folder in the output directory for the checkpoint that is being pushed, because the run may delete it meanwhile.
STAGED = ".pushed"


class PushCallback(TrainerCallback):
    """Pushes checkpoints and the model, and sets `push_to_hub` to false, so that transformers does not.

    Each checkpoint is pushed in the background, unless `hub_strategy` is "end", or an earlier push is still running and
    `hub_always_push` is false. A push of a checkpoint writes

    - its model to the top of the repository,
    - the whole checkpoint to `last-checkpoint/` or, if `hub_strategy` is "all_checkpoints", to `checkpoint-N/`. If it
      is "every_save", `last-checkpoint/` is removed at the end of training,
    - the best checkpoint so far to `checkpoint-N/`, if `load_best_model_at_end` is set.

    Training continues if a push fails. tests/hub/test_training.py resumes a run from what was pushed.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self._is_requested = args.push_to_hub
        args.push_to_hub = False
        self._args = args
        self._api = HfApi(token=args.hub_token)
        # The push in the background, and a checkpoint that was skipped because of it.
        self._running: Future[None] | None = None
        self._skipped: Path | None = None
        if not self._is_requested or args.hub_strategy == HubStrategy.END:
            # No checkpoint is pushed: the base class's method does nothing.
            self.on_save = super().on_save  # type: ignore[method-assign]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Delete the files that a killed run was pushing."""
        if state.is_world_process_zero:
            for staged in Path(args.output_dir).glob(f"{STAGED}-*"):
                shutil.rmtree(staged, ignore_errors=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin to push the checkpoint that was just saved."""
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        is_busy = self._running is not None and not self._running.done()
        if is_busy and not args.hub_always_push:
            self._skipped = checkpoint
        else:
            self._skipped = None
            self._start_push(checkpoint)

    def finish(self, is_complete: bool) -> None:
        """Push the last checkpoint if it was skipped, and wait for the push that is running.

        Args:
            is_complete: Whether training is complete. The model is then pushed next, which under "every_save" makes the
                last checkpoint useless.
        """
        is_useless = is_complete and self._args.hub_strategy == HubStrategy.EVERY_SAVE
        if self._skipped is not None and not is_useless:
            self._start_push(self._skipped)
        if self._running is not None:
            self._running.result()

    def push_model(self) -> None:
        """Push the finished model if requested.

        Raises:
            RunStopped: If that fails. It names the command to push the model later.
        """
        if not self._is_requested or self._args.process_index != 0:
            return
        folder = Path(str(self._args.output_dir)).absolute()
        name = self._args.hub_model_id or folder.name
        stale = []
        if self._args.hub_strategy == HubStrategy.EVERY_SAVE:
            stale.append(f"{LAST}/")
        try:
            name = full_id(self._args.hub_model_id, folder)
            outputs = Outputs(path=folder.parent, repo_id=name, only=[folder.name])
            for repository in outputs.repositories():
                self._send(repository.id, repository.files, "End of training", stale)
        except Exception as error:
            raise RunStopped(
                f"The model is complete in {self._args.output_dir}, but it was not pushed to {name}: "
                f"{explain(error, name)}.\nTo push it: {self._push_command(name)}",
                EXIT_PUSH_FAILED,
            ) from error
        logger.info("%-11s to %s/%s", "pushed", self._api.endpoint, name)

    def _push_command(self, repo_id: str) -> str:
        """Return the command that pushes the finished model."""
        command = ["python", "-m", "pipeline", "push", str(self._args.output_dir), "--repo_id", repo_id]
        if self._args.hub_revision:
            command += ["--revision", self._args.hub_revision]
        if self._args.hub_private_repo:
            command.append("--private")
        return shlex.join(command)

    def _start_push(self, checkpoint: Path) -> None:
        """Push a checkpoint in the background, and the best one if the run loads that at the end.

        The run may delete both before the push ends, so hard links to their files are pushed.
        """
        # Hard links take no space, and keep the files of the checkpoint until the push ends:
        #
        #     runs/x/2_sft/checkpoint-40/model.safetensors                          deleted by the trainer at step 60
        #     runs/x/2_sft/.pushed-checkpoint-40/checkpoint-40/model.safetensors    deleted here once it is pushed
        staged = checkpoint.with_name(f"{STAGED}-{checkpoint.name}")
        best = Path(str(read_json(checkpoint / STATE).get("best_model_checkpoint") or "")).name
        names = {checkpoint.name}
        if best and self._args.load_best_model_at_end:
            names.add(best)
        try:
            shutil.rmtree(staged, ignore_errors=True)
            for name in names:
                shutil.copytree(checkpoint.with_name(name), staged / name, copy_function=os.link)
            self._running = self._api.run_as_future(self._push_checkpoint, staged, checkpoint.name)
        except OSError as error:
            self._warn(checkpoint.name, error)

    def _warn(self, checkpoint: str, error: Exception) -> None:
        """Log why a checkpoint was not pushed."""
        name = self._args.hub_model_id or "the Hub"
        logger.warning("%s was not pushed to %s: %s. Training continues.", checkpoint, name, explain(error, name))

    def _push_checkpoint(self, staged: Path, newest: str) -> None:
        """Push the checkpoint `newest` and any other checkpoint in the folder `staged`, then delete that folder."""
        keeps_all = self._args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        stale = [f"{newest}/" if keeps_all else f"{LAST}/"]
        if self._args.load_best_model_at_end and not keeps_all:
            # Checkpoints that were the best until now.
            stale.append(f"{PREFIX_CHECKPOINT_DIR}-")
        try:
            files = publishable(staged / newest)
            for checkpoint in staged.iterdir():
                is_last = checkpoint.name == newest and not keeps_all
                files |= _checkpoint_files(checkpoint, LAST if is_last else checkpoint.name)
            repo_id = full_id(self._args.hub_model_id, str(self._args.output_dir))
            step = newest.rpartition("-")[2]
            self._send(repo_id, files, f"Training in progress, step {step}", stale)
            logger.info("%-11s %s to %s/%s", "pushed", newest, self._api.endpoint, repo_id)
        except Exception as error:  # noqa: BLE001 - training continues if a push fails
            self._warn(newest, error)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _send(self, repo_id: str, files: Files, message: str, stale: list[str]) -> None:
        """Push files to a repository, and delete old files from it.

        Weights, and paths that begin with one of the prefixes `stale`, are deleted if they are not in `files`.
        """

        def replaces(path: str) -> bool:
            is_weights = path.endswith((".safetensors", ".safetensors.index.json"))
            return path.startswith(tuple(stale)) or (is_weights and is_replaced(path))

        with suppress_progress_bars():
            push(
                self._api,
                repo_id,
                files,
                message,
                private=bool(self._args.hub_private_repo),
                revision=self._args.hub_revision,
                replaces=replaces,
            )


def _checkpoint_files(checkpoint: Path, folder: str) -> Files:
    """Return all files of a checkpoint, to be pushed into a folder of the repository.

    Paths of this machine are replaced: an adapter, for instance, names its base model. The manifest, by which a run
    checks the files of a checkpoint before it resumes, gets the sizes and hashes of what is pushed.
    """
    files: Files = {f"{folder}/{STATE}": checkpoint / STATE}
    paths = local_paths(checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        content = public_content(checkpoint / name, paths)
        if isinstance(content, bytes):
            entry["size"] = len(content)
            entry["sha256"] = hashlib.sha256(content).hexdigest()
        files[f"{folder}/{name}"] = content
    files[f"{folder}/{MANIFEST}"] = json.dumps(manifest, indent=1).encode() + b"\n"
    return files
