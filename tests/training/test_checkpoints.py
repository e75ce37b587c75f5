"""Checkpoints are complete or absent, and a run resumes from the latest valid one."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, TrainerCallback, TrainingArguments

import pipeline.training.checkpoint_folders as folders
import pipeline.training.reliable as module
from pipeline.errors import RunStopped, UserError
from pipeline.training.checkpoint_folders import checkpoints, newest_complete, validate_checkpoint, write_manifest
from pipeline.training.reliable import Reliable
from pipeline.training.train import _train as train
from pipeline.training.train import _train_and_save as train_and_save
from pipeline.training.train import check_architecture, save_final


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        # With dropout, the random state matters.
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        prediction = self.layer(self.dropout(x)).squeeze(-1)
        return {"loss": ((prediction - labels) ** 2).mean(), "logits": prediction}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        value = float("nan") if i == self.bad else i / 40
        return {"x": torch.tensor([value, 1.0]), "labels": torch.tensor(i / 20)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        return [self[i] for i in indices]


def make_trainer(folder: Path, bad: int | None = None, **options: Any) -> Reliable:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "max_steps": 12,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = TrainingArguments(str(folder), **{**defaults, **options})
    return Reliable(Line(), args, train_dataset=Rows(bad), eval_dataset=Rows())


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


class At(TrainerCallback):
    """Do something at one event of one step."""

    def __init__(self, event: str, step: int, action: Any) -> None:
        def handle(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                action()

        setattr(self, event, handle)


def stop() -> None:
    raise KeyboardInterrupt


def test_every_checkpoint_is_complete_and_only_the_wanted_number_stays(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_total_limit=2).train()
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-12"]
    assert [validate_checkpoint(path) for path in checkpoints(tmp_path)] == [None, None]
    assert not (tmp_path / folders.UNFINISHED).exists()
    assert not list(tmp_path.rglob("training_args.bin")), "a pickle that may hold a token"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=12, save_steps=1).train()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-12"


def test_evaluation_runs_after_the_checkpoint_of_its_step_and_is_recorded_in_it(tmp_path: Path) -> None:
    seen = []
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At("on_evaluate", 3, lambda: seen.append(validate_checkpoint(tmp_path / "checkpoint-3"))))
    trainer.train()
    assert seen == [None]
    assert '"eval_loss"' in (tmp_path / "checkpoint-3" / "trainer_state.json").read_text()


@pytest.mark.parametrize("killed_at", ["save_pretrained", "manifest", "rename", "evaluation", "step"])
def test_a_run_stopped_anywhere_ends_with_the_same_weights(
    tmp_path: Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = make_trainer(tmp_path / "whole")
    undisturbed.train()
    trainer = make_trainer(tmp_path / "parts")
    with monkeypatch.context() as patch:
        if killed_at == "save_pretrained":
            patch.setattr(trainer, "_save_optimizer_and_scheduler", lambda *_: stop())
        elif killed_at == "manifest":
            patch.setattr(folders, "write_manifest", lambda *_: stop())
        elif killed_at == "rename":
            patch.setattr(module, "replace_folder", lambda *_: stop())
        elif killed_at == "evaluation":
            patch.setattr(trainer, "_evaluate", lambda *_: stop())
        else:
            trainer.add_callback(At("on_step_begin", 7, stop))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    expected = {"evaluation": "checkpoint-3", "step": "checkpoint-6"}.get(killed_at)
    found = newest_complete(tmp_path / "parts")
    assert (found and found.name) == expected

    again = make_trainer(tmp_path / "parts")
    again.train(resume_from_checkpoint=str(found) if found else None)
    for name, weight in undisturbed.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    evaluations = [e["eval_loss"] for e in undisturbed.state.log_history if "eval_loss" in e]
    assert [e["eval_loss"] for e in again.state.log_history if "eval_loss" in e] == evaluations


def test_the_log_of_a_run_killed_in_its_last_evaluation_ends_with_a_summary_whatever_each_step_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If tokens are counted, every entry has a `train_runtime`, not only the summary of the training."""

    def make(folder: Path) -> Reliable:
        trainer = make_trainer(folder, include_num_input_tokens_seen="all")
        trainer.model.main_input_name = "x"
        return trainer

    whole = make(tmp_path / "whole")
    whole.train()
    killed = make(tmp_path / "killed")
    evaluate = killed._evaluate
    monkeypatch.setattr(killed, "_evaluate", lambda *_: evaluate(*_) if not at_last(killed) else stop())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = make(tmp_path / "killed")
    assert again.restore_finished(tmp_path / "killed" / "checkpoint-12")
    for trainer in (whole, again):
        *steps, summary = trainer.state.log_history
        assert all(summary["train_runtime"] >= entry.get("train_runtime", 0) for entry in steps)
        assert "loss" not in summary and "eval_loss" not in summary
    assert len(again.state.log_history) == len(whole.state.log_history)


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "with a reference"])
def test_a_missed_last_evaluation_has_the_precision_of_training(
    others: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> Reliable:
        trainer = make_trainer(folder, bf16=True)
        for _ in range(others):
            trainer.accelerator.prepare_model(Line(), evaluation_mode=True)
        return trainer

    whole = make(tmp_path / "whole")
    whole.train()
    killed = make(tmp_path / "killed")
    evaluate = killed._evaluate
    monkeypatch.setattr(killed, "_evaluate", lambda *_: evaluate(*_) if not at_last(killed) else stop())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = make(tmp_path / "killed")
    assert again.restore_finished(tmp_path / "killed" / "checkpoint-12")
    evaluations = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (whole, again)
    ]
    assert evaluations[0] == evaluations[1]


def test_what_a_kill_left_of_an_old_checkpoint_is_not_published_with_the_final_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is too many is renamed before it is deleted."""
    trainer = make_trainer(tmp_path, save_total_limit=1)
    remove = shutil.rmtree

    def stop_at_last(path: Path, **options: Any) -> None:
        # The renamed checkpoint has files of its own, the folder of a new one only that.
        if trainer.state.global_step == 12 and (Path(path) / "optimizer.pt").exists():
            stop()
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop_at_last)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    again = make_trainer(tmp_path, save_total_limit=1)
    assert again.restore_finished(tmp_path / "checkpoint-12")
    assert names(tmp_path) == ["checkpoint-12"]
    monkeypatch.setattr("pipeline.training.train.model_card", lambda _: "A card.")
    save_final(again)
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["README.md", "model.safetensors", "trainer_state.json"]


def test_a_surplus_checkpoint_that_a_killed_run_left_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was killed after its last step, before it deleted what exceeds `save_total_limit`."""
    trainer = make_trainer(tmp_path, save_total_limit=2)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "checkpoints", lambda folder: checkpoints(folder) if not at_last(trainer) else stop())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-9", "checkpoint-12"]
    assert make_trainer(tmp_path, save_total_limit=2).restore_finished(tmp_path / "checkpoint-12")
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-12"]


def at_last(trainer: Reliable) -> bool:
    return trainer.state.global_step == trainer.state.max_steps


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 100)


def flip(path: Path) -> None:
    content = bytearray((path / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "optimizer.pt").write_bytes(content)


@pytest.mark.parametrize("options", [{"eval_steps": 2}, {"eval_strategy": "no"}, {"eval_on_start": True}], ids=str)
def test_when_it_is_evaluated_has_no_effect_on_the_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    one = make_trainer(tmp_path / "one")
    one.train()
    other = make_trainer(tmp_path / "other", **options)
    other.train()
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name])


def test_a_schedule_that_follows_evaluations_is_resumed_as_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        # The rate is halved by each evaluation whose loss is not 90 % lower than the best one.
        "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, "threshold": 0.9},
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }
    whole = make_trainer(tmp_path / "whole", **options)
    rates = learning_rates(whole)
    whole.train()
    again = make_trainer(tmp_path / "again", **options)
    resumed = learning_rates(again)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert len(set(rates)) > 1, "the schedule lowered the rate"
    assert resumed == rates[6:]
    assert torch.equal(again.model.layer.weight, whole.model.layer.weight)


def test_an_epoch_has_the_same_steps_with_a_large_batch_and_with_an_accumulated_one(tmp_path: Path) -> None:
    ends = []
    for size, accumulated in ((16, 1), (4, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = make_trainer(tmp_path / str(size), max_steps=-1, num_train_epochs=2, **options)
        trainer.model.dropout.p = 0.0
        trainer.train()
        # 40 rows have two steps of 16.
        assert trainer.state.global_step == 4
        ends.append(trainer.model.layer.weight.detach().clone())
    assert torch.allclose(*ends, atol=1e-6)


def test_a_checkpoint_of_the_model_alone_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The toy has no config.
    monkeypatch.setattr("pipeline.training.train.check_architecture", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        trainer = make_trainer(tmp_path, save_only_model=True)
        trainer.add_callback(At("on_step_end", 7, stop))
        trainer.train()
    again = make_trainer(tmp_path, save_only_model=True)
    again.model.config = None
    with pytest.raises(UserError, match=r"checkpoint-6: cannot be resumed without the optimizer's state"):
        train_and_save(again, None)


def learning_rates(trainer: Reliable) -> list[float]:
    """Return the learning rate of each step, whatever was logged."""
    rates: list[float] = []
    step = trainer.create_optimizer().step

    def note(*args: Any, **kwargs: Any) -> Any:
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs)

    trainer.optimizer.step = note
    return rates


@pytest.mark.parametrize("more", [{"max_steps": 20}, {"max_steps": -1, "num_train_epochs": 2}], ids=str)
def test_a_finished_run_goes_on_with_more_steps_on_the_schedule_of_the_new_total(
    tmp_path: Path, more: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_trainer(tmp_path / "whole", **more)
    expected = learning_rates(whole)
    whole.train()
    make_trainer(tmp_path / "parts", max_steps=8, save_steps=8).train()
    again = make_trainer(tmp_path / "parts", **more, save_steps=5)
    found = learning_rates(again)
    last = tmp_path / "parts/checkpoint-8"
    assert not again.restore_finished(last)
    with caplog.at_level(logging.INFO, logger="pipeline"):
        again.train(resume_from_checkpoint=str(last))
    assert len(found) == 12 and found == pytest.approx(expected[8:], rel=1e-12)
    assert names(tmp_path / "parts") == ["checkpoint-8", "checkpoint-10", "checkpoint-15", "checkpoint-20"]
    assert "at step 8, to 20 steps instead of 8" in caplog.text
    finished = make_trainer(tmp_path / "parts", **more)
    assert finished.restore_finished(tmp_path / "parts/checkpoint-20")


DAMAGES: dict[str, Any] = {
    "truncated weights": truncate,
    "one flipped bit": flip,
    "missing scheduler": lambda path: (path / "scheduler.pt").unlink(),
    "missing manifest": lambda path: (path / "manifest.json").unlink(),
    "manifest of nonsense": lambda path: (path / "manifest.json").write_text("{"),
    "manifest of another kind": lambda path: (path / "manifest.json").write_text("[]"),
    "one flipped bit of the state": lambda path: (path / "trainer_state.json").write_text(
        (path / "trainer_state.json").read_text().replace('"epoch": 1', '"epoch": 3', 1)
    ),
    "state cut off": lambda path: (path / "trainer_state.json").write_text('{"global_'),
    "state of another step": lambda path: shutil.copy(
        path.parent / "checkpoint-9" / "trainer_state.json", path / "trainer_state.json"
    ),
    "empty directory": lambda path: [file.unlink() for file in path.iterdir()],
    "no random state": lambda path: (path / "rng_state.pth").unlink(),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder).train()
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    finished: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    DAMAGES[damage](folder / "checkpoint-12")
    with caplog.at_level(logging.WARNING):
        assert newest_complete(folder) == folder / "checkpoint-9"
    assert "checkpoint-12 is skipped" in caplog.text
    again = make_trainer(folder)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    assert newest_complete(folder) == folder / "checkpoint-12", "the damaged one was replaced"


def test_a_manifest_that_nobody_can_read_does_not_cost_the_checkpoint_before(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    (tmp_path / "checkpoint-12" / "manifest.json").write_text("[" * 99_999)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-9"


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_code_in_a_checkpoint_that_its_manifest_vouches_for_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path, max_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    torch.save(Code(), checkpoint / "optimizer.pt")
    write_manifest(checkpoint, 3, evaluation_due=False)
    with pytest.raises(UserError, match=f"resume_from_checkpoint: {checkpoint}: has a file that .* would run code"):
        train(make_trainer(tmp_path, max_steps=6), checkpoint)
    assert not Path("ran").exists()


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "missing") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_complete(tmp_path) is None


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, vocab_size=100).save_pretrained(tmp_path)
    check_architecture(tmp_path, LlamaConfig(hidden_size=64, vocab_size=100))
    with pytest.raises(UserError, match="hidden_size 64 instead of 32, vocab_size 100 instead of 99"):
        check_architecture(tmp_path, LlamaConfig(hidden_size=32, vocab_size=99))
    check_architecture(tmp_path / "an adapter", LlamaConfig())


@pytest.mark.parametrize("place", ["_save_optimizer_and_scheduler", "write_manifest"])
def test_the_last_good_checkpoint_survives_a_failed_save(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, save_total_limit=1)
    owner: Any = trainer if hasattr(trainer, place) else folders
    save = getattr(owner, place)

    def full(*args: Any) -> None:
        if trainer.state.global_step == 6:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(owner, place, full)
    with pytest.raises(RunStopped, match=r"step 6 could not be written.*No space left.*checkpoint-3"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-3"]
    assert validate_checkpoint(tmp_path / "checkpoint-3") is None
    assert not (tmp_path / folders.UNFINISHED).exists()


def test_a_checkpoint_stays_until_the_next_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is complete once its manifest is written."""
    trainer = make_trainer(tmp_path, eval_strategy="no", save_total_limit=1)
    seen, write = {}, folders.write_manifest

    def look(checkpoint: Path, *options: Any) -> None:
        step = options[0]
        seen[step] = names(tmp_path)
        write(checkpoint, *options)
        assert names(tmp_path) == seen[step]

    monkeypatch.setattr(folders, "write_manifest", look)
    trainer.train()
    assert seen == {3: [], 6: ["checkpoint-3"], 9: ["checkpoint-6"], 12: ["checkpoint-9"]}, "what a killed run has"
    assert names(tmp_path) == ["checkpoint-12"]


def test_a_first_checkpoint_that_cannot_be_completed_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, eval_strategy="no", save_steps=6)

    def fail(checkpoint: Path, *options: Any) -> None:
        raise OSError("no quota left")

    monkeypatch.setattr(folders, "write_manifest", fail)
    with pytest.raises(RunStopped, match=r"step 6 could not be written .*no quota left.* then starts again"):
        train(trainer, None)
    assert trainer.state.global_step == 6
    assert not names(tmp_path) and not (tmp_path / folders.UNFINISHED).exists(), "its room on the disk is free again"


def test_the_best_checkpoint_stays_and_is_loaded(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_total_limit=1, load_best_model_at_end=True, learning_rate=0.5)
    values = iter([0.5, 0.1, 0.3, 0.4])
    evaluate = trainer._evaluate

    def pretend(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {**evaluate(*args, **kwargs), "eval_loss": next(values)}

    trainer._evaluate = pretend  # type: ignore[method-assign]
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert validate_checkpoint(tmp_path / "checkpoint-6") is None


def test_a_loss_that_is_not_a_number_stops_before_the_update(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bad=17, save_steps=1)
    with pytest.raises(RunStopped) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert "nan" in message and "17" in message.split("rows")[1].split("]")[0]
    last = newest_complete(tmp_path)
    assert (str(last) in message) if last else ("no checkpoint yet" in message)
    assert f"step {trainer.state.global_step + 1}" in message
    assert all(weight.isfinite().all() for weight in trainer.model.state_dict().values())


def test_the_best_checkpoint_alone_is_complete_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"save_strategy": "best", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = make_trainer(tmp_path, greater_is_better=False, **options)
    values, found, write = iter([0.5, 0.4, 0.1, 0.2]), [], folders.write_manifest
    evaluate = trainer._evaluate

    def slow(checkpoint: Path, *options: Any) -> None:
        time.sleep(0.3)
        write(checkpoint, *options)

    monkeypatch.setattr(folders, "write_manifest", slow)
    monkeypatch.setattr(trainer, "_evaluate", lambda *given: {**evaluate(*given), "eval_loss": next(values)})
    monkeypatch.setattr(trainer, "_load_best_model", lambda: found.extend(names(tmp_path)))
    trainer.train()
    assert found == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]


class ReadsCheckpoints(TrainerCallback):
    """A tracker that copies what was saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str | None] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(validate_checkpoint(self.folder / f"checkpoint-{state.global_step}"))


def test_a_callback_that_reads_checkpoints_finds_them_complete(tmp_path: Path) -> None:
    reader = ReadsCheckpoints(tmp_path)
    trainer = make_trainer(tmp_path, eval_strategy="no")
    trainer.add_callback(reader)
    trainer.train()
    assert reader.found == [None] * 4


def test_large_files_have_checksums_of_their_blocks(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifests without such checksums stay valid."""
    folder = tmp_path / "checkpoint-12"
    shutil.copytree(finished / "checkpoint-12", folder)
    monkeypatch.setattr(folders, "BLOCK", 100)
    assert validate_checkpoint(folder) is None, "written with whole files"
    (folder / "manifest.json").unlink()
    write_manifest(folder, 12, False)
    assert "sha256_of_blocks" in (folder / "manifest.json").read_text()
    assert validate_checkpoint(folder) is None
    flip(folder)
    assert validate_checkpoint(folder) == "optimizer.pt has changed"
