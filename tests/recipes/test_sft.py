"""Instruction tuning: what is learned from, what a token sees, and LoRA."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM
from trl import SFTConfig, SFTTrainer

from pipeline.models.kernels.packed_rows import PackedRows
from pipeline.training.fine_tuning import SFTTrainer as OurSFTTrainer
from tests.helpers.small_model import conversation, run_recipe, save_model, tokenizer

CONVERSATIONS = [conversation(f"What is {i}?", f"It is {i * 7}.") for i in range(6)]
CONVERSATIONS[2] += conversation("And then?", "Nothing.")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> SFTTrainer:
    folder = tmp_path_factory.mktemp("sft")
    args = SFTConfig(
        str(folder / "output"),
        use_cpu=True,
        bf16=False,
        packing=True,
        max_length=96,
        assistant_only_loss=True,
        per_device_train_batch_size=2,
        report_to="none",
    )
    return SFTTrainer(
        save_model(folder / "model"),
        args,
        train_dataset=Dataset.from_dict({"messages": CONVERSATIONS}),
        processing_class=tokenizer(),
    )


def test_a_packed_conversation_sees_no_other(trainer: SFTTrainer) -> None:
    batch = next(iter(trainer.get_train_dataloader()))
    (input_ids,), (positions,) = batch["input_ids"], batch["position_ids"]
    starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(input_ids)]
    assert len(starts) > 3, "several conversations are in the batch"
    model = trainer.model.eval()
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        for start, end in itertools.pairwise(starts):
            alone = model(input_ids=input_ids[start:end][None]).logits[0]
            torch.testing.assert_close(together[start:end], alone, atol=1e-5, rtol=1e-5)


def test_rows_kept_apart_have_the_loss_of_a_flattened_batch(trainer: SFTTrainer) -> None:
    columns = ["input_ids", "labels", "seq_lengths"]
    rows = [{name: row[name] for name in columns} for row in trainer.train_dataset]
    assert len({len(row["input_ids"]) for row in rows}) > 1, "something is padded"
    apart = PackedRows(tokenizer().pad_token_id, return_position_ids=True)(rows)
    flat = trainer.data_collator(rows)
    assert apart["input_ids"].shape[0] == len(rows) and flat["input_ids"].shape[0] == 1
    assert (apart["labels"] != -100).sum() == (flat["labels"] != -100).sum()
    model = trainer.model.eval()
    with torch.no_grad():
        losses = [
            model(**{name: batch[name] for name in ("input_ids", "labels", "position_ids")}).loss
            for batch in (apart, flat)
        ]
    torch.testing.assert_close(*losses)


def test_the_loss_is_of_what_the_assistant_says_and_of_its_end_of_turn(trainer: SFTTrainer) -> None:
    said = set()
    for batch in trainer.get_train_dataloader():
        (input_ids,), (labels,) = batch["input_ids"], batch["labels"]
        assert all(label in (-100, token) for label, token in zip(labels, input_ids, strict=True))
        text = "".join(tokenizer().decode(token) if token >= 0 else "\n" for token in labels.tolist())
        said |= {part for part in text.split("\n") if part}
    answers = {message["content"] for turns in CONVERSATIONS for message in turns if message["role"] == "assistant"}
    assert said == {answer + tokenizer().eos_token for answer in answers}


def test_an_adapter_is_trained_resumed_saved_and_loads(tmp_path: Path) -> None:
    inputs, output = tmp_path / "inputs", tmp_path / "adapter"
    lora = ("--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4", "--bf16", "false")
    result = run_recipe("sft", inputs, *lora, "--output_dir", str(output), "--eval_strategy", "no")
    assert result.returncode == 0, result.stderr
    adapted = AutoPeftModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    tokens = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert not torch.allclose(adapted(tokens).logits, base(tokens).logits)
    whole = (output / "adapter_model.safetensors").read_bytes()

    # Without its last checkpoint, the run looks as if it was killed after step 6.
    shutil.rmtree(output / "checkpoint-8")
    again = run_recipe("sft", inputs, *lora, "--output_dir", str(output), "--eval_strategy", "no")
    assert again.returncode == 0 and "resuming    from" in again.stderr, again.stderr
    assert (output / "adapter_model.safetensors").read_bytes() == whole


def test_layers_that_do_not_attend_get_rows_that_trls_collator_flattens(tmp_path: Path) -> None:
    config = Lfm2Config(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, packing=True, max_length=96, report_to="none")
    data = Dataset.from_dict({"messages": CONVERSATIONS})
    kinds = []
    for model in (Lfm2ForCausalLM(config), AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "llama"))):
        trainer = OurSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer())
        kinds.append(isinstance(trainer.data_collator, PackedRows))
    # Convolutions would run on into the next conversation of a row, where transformers refuses TRL's batches.
    assert kinds == [False, True]
