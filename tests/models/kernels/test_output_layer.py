"""The output layer of instruction tuning: what it returns is what TRL's returns, for less work."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from pipeline.models.kernels import output_layer
from pipeline.models.kernels.output_layer import project_labelled_positions
from tests.helpers.small_model import conversation, save_model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output_layer")


def trainer(folder: Path, peft_config: LoraConfig | None = None) -> SFTTrainer:
    args = SFTConfig(
        str(folder / "output"), use_cpu=True, bf16=False, max_length=96, assistant_only_loss=True, report_to="none"
    )
    rows = Dataset.from_dict({"messages": [conversation(f"What is {i}?", f"It is {i * 7}.") for i in range(8)]})
    # The weights of the adapters are random.
    torch.manual_seed(0)
    return SFTTrainer(
        save_model(folder / "model"),
        args,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def rows_projected(trained: SFTTrainer) -> list[int]:
    """Return a list to which the number of rows is added whenever the output layer is applied as a module."""
    rows: list[int] = []
    head = trained.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[:-1].numel()))
    return rows


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_loss_metrics_and_gradients_are_those_of_trl(folder: Path, adapter: LoraConfig | None) -> None:
    theirs, ours = trainer(folder, adapter), trainer(folder, adapter)
    project_labelled_positions(ours.model)
    batch = next(iter(ours.get_train_dataloader()))
    labelled = (batch["labels"][:, 1:] != -100).sum()
    rows = rows_projected(ours)
    losses = []
    for trained in (theirs, ours):
        trained.model.train()
        loss = trained.compute_loss(trained.model, dict(batch), num_items_in_batch=labelled)
        loss.backward()
        losses.append(loss.item())
    assert rows == [labelled] and labelled < batch["labels"].numel() / 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name in ("entropy", "mean_token_accuracy"):
        assert ours._metrics["train"][name] == pytest.approx(theirs._metrics["train"][name], rel=1e-4)
    pairs = zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True)
    compared = [(name, x.grad, y.grad) for (name, x), y in pairs if x.requires_grad]
    assert compared
    for name, x, y in compared:
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6, msg=name)


def test_a_batch_without_labels_has_a_loss_of_zero(folder: Path) -> None:
    trained = trainer(folder)
    project_labelled_positions(trained.model)
    batch = next(iter(trained.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trained.compute_loss(trained.model, batch)
    loss.backward()
    assert loss.item() == 0


def test_the_head_is_left_to_trl_where_it_is_better(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def uses_ours(trained: SFTTrainer) -> bool:
        project_labelled_positions(trained.model)
        rows = rows_projected(trained)
        trained.compute_loss(trained.model, next(iter(trained.get_train_dataloader())))
        return bool(rows)

    capped = trainer(folder)
    capped.model.config.final_logit_softcapping = 30.0
    assert uses_ours(trainer(folder)) and not uses_ours(capped)
    large = trainer(folder)
    monkeypatch.setattr(output_layer, "LOGITS", 100)
    assert not uses_ours(large)
    monkeypatch.setattr(output_layer.hardware, "accelerator", lambda: "cuda")
    monkeypatch.setattr(output_layer, "LOGITS", 10**9)
    assert not uses_ours(trainer(folder))
