"""What a run pushes to the Hub: checkpoints while it trains, and the model once it is complete on the disk.

transformers creates the repository first, pushes pickles and lock files, and loses the run if the last push fails.
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
from pipeline.hub.published_files import Files, places, public_content, publishable
from pipeline.hub.repositories import Outputs
from pipeline.hub.upload import explain, is_replaced, push

logger = logging.getLogger(__name__)

# Folder in the output directory for the checkpoint that is being pushed, because the run may delete it meanwhile.
STAGED = ".pushed"


class PushCallback(TrainerCallback):
    """Pushes checkpoints and the model in place of transformers, and sets `push_to_hub` to false.

    Every checkpoint is pushed in the background, unless `hub_strategy` is "end" or an earlier push is still running and
    `hub_always_push` is false: its model, and all of it as `last-checkpoint/` (`checkpoint-N/` for "all_checkpoints").
    Under "every_save", `last-checkpoint/` is removed at the end. A best checkpoint to load at the end is pushed, too.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self._is_asked, args.push_to_hub = args.push_to_hub, False
        self._args, self._api = args, HfApi(token=args.hub_token)
        self._running: Future[None] | None = None
        self._missed: Path | None = None
        if not self._is_asked or args.hub_strategy == HubStrategy.END:
            # Then no checkpoint is pushed.
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
        is_busy = self._running is not None and not self._running.done() and not args.hub_always_push
        self._missed = checkpoint if is_busy else None
        if not is_busy:
            self._begin(checkpoint)

    def finish(self, is_complete: bool) -> None:
        """Wait for the push that is running, and push the last checkpoint if it was skipped and is still useful.

        If training `is_complete`, the model will be pushed.
        """
        if self._missed is not None and not (is_complete and self._args.hub_strategy == HubStrategy.EVERY_SAVE):
            self._begin(self._missed)
        if self._running is not None:
            self._running.result()

    def push_model(self) -> None:
        """Push the finished model if requested. If that fails, `RunStopped` names the command to push it later."""
        if not self._is_asked or self._args.process_index != 0:
            return
        folder = Path(str(self._args.output_dir)).absolute()
        name = self._args.hub_model_id or folder.name
        replaced = (f"{LAST}/",) if self._args.hub_strategy == HubStrategy.EVERY_SAVE else ()
        try:
            name = full_id(self._args.hub_model_id, folder)
            for item in Outputs(path=folder.parent, repo_id=name, only=[folder.name]).repositories():
                self._send(item.id, item.files, "End of training", replaced)
        except Exception as error:
            command = ["python", "-m", "pipeline", "push", str(self._args.output_dir), "--repo_id", name]
            command += ["--revision", self._args.hub_revision] if self._args.hub_revision else []
            command += ["--private"] if self._args.hub_private_repo else []
            raise RunStopped(
                f"The model is complete in {self._args.output_dir}, but it was not pushed to {name}: "
                f"{explain(error, name)}.\nTo push it: {shlex.join(command)}",
                EXIT_PUSH_FAILED,
            ) from error
        logger.info("%-11s to %s/%s", "pushed", self._api.endpoint, name)

    def _begin(self, checkpoint: Path) -> None:
        """Link the files of a checkpoint, which the run may delete meanwhile, and push them in the background."""
        # Hard links cost no space, and keep the files of the checkpoint until the push ends:
        #
        #     runs/x/2_sft/checkpoint-40/model.safetensors                          deleted by the trainer at step 60
        #     runs/x/2_sft/.pushed-checkpoint-40/checkpoint-40/model.safetensors    deleted here once it is pushed
        staged = checkpoint.with_name(f"{STAGED}-{checkpoint.name}")
        best = Path(str(read_json(checkpoint / STATE).get("best_model_checkpoint") or "")).name
        names = {checkpoint.name, best} - {""} if self._args.load_best_model_at_end else {checkpoint.name}
        try:
            shutil.rmtree(staged, ignore_errors=True)
            for name in names:
                shutil.copytree(checkpoint.with_name(name), staged / name, copy_function=os.link)
            self._running = self._api.run_as_future(self._push_checkpoint, staged, checkpoint.name)
        except OSError as error:
            self._warn(checkpoint.name, error)

    def _warn(self, checkpoint: str, error: Exception) -> None:
        name = self._args.hub_model_id or "the Hub"
        logger.warning("%s was not pushed to %s: %s. Training goes on.", checkpoint, name, explain(error, name))

    def _push_checkpoint(self, staged: Path, newest: str) -> None:
        """Push the checkpoint `newest` and any other checkpoint in the folder `staged`, then delete that folder."""
        keeps_all = self._args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        keeps_best = self._args.load_best_model_at_end and not keeps_all
        try:
            files = publishable(staged / newest)
            for checkpoint in staged.iterdir():
                folder = LAST if checkpoint.name == newest and not keeps_all else checkpoint.name
                files[f"{folder}/{STATE}"] = checkpoint / STATE
                manifest, known = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")), places(checkpoint)
                for name, entry in manifest["files"].items():
                    # Paths of this machine are replaced: an adapter, for instance, names its base model.
                    content = files[f"{folder}/{name}"] = public_content(checkpoint / name, known)
                    if isinstance(content, bytes):
                        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                files[f"{folder}/{MANIFEST}"] = json.dumps(manifest, indent=1).encode() + b"\n"
            replaced = (f"{newest}/" if keeps_all else f"{LAST}/", *[f"{PREFIX_CHECKPOINT_DIR}-"] * keeps_best)
            message = f"Training in progress, step {newest.rpartition('-')[2]}"
            repo_id = full_id(self._args.hub_model_id, str(self._args.output_dir))
            self._send(repo_id, files, message, replaced)
            logger.info("%-11s %s to %s/%s", "pushed", newest, self._api.endpoint, repo_id)
        except Exception as error:  # noqa: BLE001 - training continues if a push fails
            self._warn(newest, error)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _send(self, name: str, files: Files, message: str, replaced: tuple[str, ...]) -> None:
        """Push files to the repository `name`. Replace its weights, and paths that begin with one of `replaced`."""
        options = {"private": bool(self._args.hub_private_repo), "revision": self._args.hub_revision}
        weights = (".safetensors", ".safetensors.index.json")
        with suppress_progress_bars():
            push(
                *(self._api, name, files, message),
                replaces=lambda path: path.startswith(replaced) or (path.endswith(weights) and is_replaced(path)),
                **options,
            )
