"""Matrices, embeddings and the rest: each group is updated as by torch's optimizers, and checkpoints keep the state."""

import copy
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, get_scheduler

from pipeline.models.kernels import muon
from pipeline.models.scratch import ScratchArguments, build_model
from pipeline.training.optimizer import MuonWithAdamW, OptimizerArguments, build_optimizer, optimizer_cls_and_kwargs
from tests.helpers.small_model import tokenizer

MUON = OptimizerArguments(use_muon=True, muon_learning_rate=0.03)


def model(tied: bool = True) -> LlamaForCausalLM:
    sizes = ScratchArguments(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    return build_model(sizes, tokenizer(), seed=0)


def build(trained: LlamaForCausalLM, chosen: OptimizerArguments = MUON) -> torch.optim.Optimizer:
    rates = {"learning_rate": 0.01, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-8}
    return build_optimizer(trained, TrainingArguments("unused", use_cpu=True, **rates), chosen)


def batches() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(len(tokenizer()), (2, 16), generator=generator)


def steps(trained: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], tokens: list[torch.Tensor]) -> None:
    for ids in tokens:
        trained(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def names(trained: LlamaForCausalLM, group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in trained.named_parameters() if id(parameter) in chosen}


@pytest.mark.usefixtures("torchs_muon")
@pytest.mark.parametrize("tied", [True, False])
def test_steps_are_those_of_torchs_optimizers_on_the_same_split(tied: bool) -> None:
    one, reference = model(tied), model(tied)
    blocks = [(n, p) for n, p in reference.named_parameters() if n.startswith("model.layers") and p.ndim == 2]
    rest = [(n, p) for n, p in reference.named_parameters() if n not in dict(blocks)]
    muon = torch.optim.Muon([p for _, p in blocks], lr=0.03, weight_decay=0.1)
    adamw = torch.optim.AdamW([p for _, p in rest], lr=0.01, weight_decay=0.0, betas=(0.9, 0.98), eps=1e-8)
    tokens = [ids for ids, _ in zip(batches(), range(4), strict=False)]
    before = copy.deepcopy(one)
    optimizer = build(one)
    steps(one, [optimizer], tokens[:1])
    steps(reference, [muon, adamw], tokens[:1])
    # Products of stacked matrices may be rounded differently, by a fraction of an update.
    assert difference(one, reference) < 0.001 and difference(one, before) > 0.009
    steps(one, [optimizer], tokens[1:])
    steps(reference, [muon, adamw], tokens[1:])
    assert difference(one, reference) < 0.002


def test_large_matrices_are_orthogonalized_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = model(), model()
    for trained in (together, alone):
        steps(trained, [build(trained)], [next(batches())])
        monkeypatch.setattr(muon, "NUMBERS_AT_ONCE", 1)
    assert difference(together, alone) < 0.001


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_of_the_blocks_go_to_muon_and_everything_else_to_adamw(tied: bool) -> None:
    trained = model(tied)
    optimizer = build(trained)
    matrices, tables, vectors = (names(trained, group) for group in optimizer.param_groups)
    others = tables | vectors
    assert matrices and all(name.startswith("model.layers.") and name.endswith("_proj.weight") for name in matrices)
    assert tables == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    assert any("norm" in name for name in vectors) and any(name.endswith("bias") for name in vectors)
    assert matrices | others == {name for name, _ in trained.named_parameters()} and not matrices & others
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.01, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]


def test_embeddings_have_a_learning_rate_of_their_own_with_either_optimizer() -> None:
    for use_muon in (True, False):
        trained = model(tied=False)
        before = copy.deepcopy(trained.state_dict())
        optimizer = build(trained, OptimizerArguments(use_muon, 0.03, embedding_learning_rate=1e-4))
        steps(trained, [optimizer], [next(batches())])
        moved = {name: (p - before[name]).abs().max().item() for name, p in trained.named_parameters()}
        assert moved["lm_head.weight"] == pytest.approx(1e-4, rel=0.01), "AdamW's first step is the learning rate"
        assert moved["model.embed_tokens.weight"] == pytest.approx(1e-4, rel=0.01)
        assert moved["model.norm.weight"] == pytest.approx(0.01, rel=0.01)
        assert moved["model.layers.0.mlp.up_proj.weight"] > 1e-3


def test_without_muon_weight_decay_is_for_the_matrices_of_the_blocks() -> None:
    trained = model()
    optimizer = build(trained, OptimizerArguments(embedding_learning_rate=1e-4))
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed = [names(trained, group) for group in optimizer.param_groups if group["weight_decay"]]
    assert len(decayed) == 1 and all(name.endswith("_proj.weight") for name in decayed[0])


def test_frozen_parameters_are_left_alone() -> None:
    trained = model()
    frozen = {name: p.clone() for name, p in trained.named_parameters() if "layers.0" in name}
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(name not in frozen)
    steps(trained, [build(trained)], [next(batches())])
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in trained.named_parameters() if name in frozen)


def test_a_restored_optimizer_continues_bit_for_bit() -> None:
    tokens = [ids for ids, _ in zip(batches(), range(6), strict=False)]
    whole = model()
    optimizer = build(whole)
    steps(whole, [optimizer], tokens[:3])
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    resumed = copy.deepcopy(whole)
    restored = build(resumed)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    fresh = copy.deepcopy(whole)
    for trained, own in ((whole, optimizer), (resumed, restored), (fresh, build(fresh))):
        steps(trained, [own], tokens[3:])
    assert equal(whole, resumed)
    assert not equal(whole, fresh), "the state matters"


def test_a_schedule_scales_all_learning_rates() -> None:
    optimizer = build(model())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.015, 0.005, 0.005])


def train(folder: Path, resume: bool = False) -> tuple[LlamaForCausalLM, Trainer, int]:
    """Train to step 8 with a checkpoint after every fourth; return the number of batches as well."""
    args = TrainingArguments(
        str(folder),
        max_steps=8,
        save_steps=4,
        learning_rate=0.01,
        weight_decay=0.1,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [
        {"input_ids": ids[0].tolist(), "labels": ids[0].tolist()} for ids, _ in zip(batches(), range(40), strict=False)
    ]
    trained = model()
    trainer = Trainer(
        trained,
        args,
        train_dataset=Dataset.from_list(rows),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, MUON),
    )
    batches_seen = []
    trained.register_forward_hook(lambda *_: batches_seen.append(None))
    trainer.train(resume_from_checkpoint=resume)
    return trained, trainer, len(batches_seen)


def test_a_trainer_resumes_with_it_bit_for_bit(tmp_path: Path) -> None:
    whole, trainer, _ = train(tmp_path)
    # accelerate wraps the optimizer.
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, MuonWithAdamW)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.03, 0.01, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.98)
    # Without its last checkpoint, the run looks as if it was killed after step 4.
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed, _, batches_seen = train(tmp_path, resume=True)
    assert batches_seen == 4
    assert equal(whole, resumed)
    assert not equal(whole, model())


def test_by_default_the_trainer_keeps_its_own_optimizer(tmp_path: Path) -> None:
    assert optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), use_cpu=True), OptimizerArguments()) is None


@pytest.mark.parametrize("name", ["polynomial", "cosine_with_min_lr", "cosine_warmup_with_min_lr"])
def test_schedules_that_end_at_a_learning_rate_work_with_muon(name: str) -> None:
    settings = {} if name == "polynomial" else {"min_lr": 1e-5}
    get_scheduler(name, build(model()), 2, 10, settings)
