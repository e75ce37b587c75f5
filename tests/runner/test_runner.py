"""The runner, on recipe folders whose steps are stand-ins that take no time (`stand_in_step.py`)."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.runner import session
from pipeline.runner.plan import read_plan
from pipeline.stages import STAGES
from tests.helpers.refusals import refused
from tests.runner.conftest import ALL, Runner, changed, configure, identities, status, times


def test_every_step_runs_once_and_its_command_is_shown(run: Runner) -> None:
    code, out, _ = run()
    assert code == 0
    assert times() == {"0_random": 1, "1_pretrain": 1, "2_sft": 1, "3_reward": 1, "data": 1}
    commands = [line for line in out.splitlines() if line.startswith("$ ")]
    assert commands[2] == "$ python -m tests.helpers.stand_in_step --config recipe/1_pretrain.yaml"
    record = json.loads(Path("runs/r/run.json").read_text())
    assert record["steps"]["2_sft"]["seconds"] > 0
    assert record["recipe"] == "recipe"


def test_a_second_run_skips_all(run: Runner) -> None:
    run()
    before = identities()
    code, out, _ = run()
    assert code == 0
    assert "$ " not in out
    assert changed(before) == set()


def test_steps_that_another_command_ran_during_the_checks_are_not_repeated(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = session.lock

    @contextmanager
    def lock_after_another_command(path: Path, orphans_only: bool) -> Iterator[tuple[int, ...]]:
        monkeypatch.setattr(session, "lock", lock)
        assert main(["run", "recipe"]) == 0
        with lock(path, orphans_only) as descriptors:
            yield descriptors

    monkeypatch.setattr(session, "lock", lock_after_another_command)
    assert run()[0] == 0
    assert set(times().values()) == {1}


def test_a_changed_field_runs_its_step_and_what_depends_on_it_again(folder: Path, run: Runner) -> None:
    run()
    before = identities()
    Path("runs/r/2_sft/old.txt").touch()
    configure(folder, "2_sft", num_train_epochs=3)
    _, out, _ = run()
    assert "num_train_epochs: None -> 3" in out
    assert not Path("runs/r/2_sft/old.txt").exists()
    assert changed(before) == {"2_sft", "3_reward"}


def trashed() -> list[str]:
    """What lies in the run's trash, without the times at which it came there."""
    return sorted(str(Path(*path.parts[4:])) for path in Path("runs/r/.trash").rglob("*") if path.is_file())


def test_what_a_change_replaces_is_in_the_trash_and_only_force_deletes(folder: Path, run: Runner) -> None:
    run()
    Path("runs/r/2_sft/checkpoint-1").mkdir()
    Path("runs/r/2_sft/checkpoint-1/model").write_text("precious")
    record = Path("runs/r/run.json").read_bytes()
    configure(folder, "2_sft", num_train_epochs=3)
    _, out, _ = run("--dry-run")
    assert "moves runs/r/2_sft to .trash" in out
    _, out, _ = run()
    assert out.count("earlier output was moved to runs/r/.trash/") == out.count(".trash") == 1
    replaced = ["2_sft/checkpoint-1/model", "2_sft/ran.txt", "3_reward/ran.txt"]
    assert trashed() == [*replaced, "logs/2_sft.log", "logs/3_reward.log", "run.json"]
    (time,) = Path("runs/r/.trash").iterdir()
    assert (time / "2_sft/checkpoint-1/model").read_text() == "precious"
    assert (time / "run.json").read_bytes() == record
    run("--from", "3_reward")
    assert len(list(Path("runs/r/.trash").iterdir())) == 2
    before = trashed()
    _, out, _ = run("--force", "2_sft")
    assert "removed runs/r/2_sft" in out
    assert trashed() == sorted([*before, "3_reward/ran.txt", "logs/3_reward.log", "run.json"]), "3_reward was not named"
    before = trashed()
    run("--force")
    assert trashed() == before


def test_a_run_that_is_not_changed_has_no_trash(run: Runner) -> None:
    run()
    run()
    assert not Path("runs/r/.trash").exists()


def test_a_step_with_more_steps_continues_and_what_depends_on_it_runs_again(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", max_steps=2)
    run()
    checkpoint = Path("runs/r/2_sft/checkpoint-2")
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 2}')
    before = identities()
    configure(folder, "2_sft", max_steps=5)
    _, out, _ = run("--dry-run")
    assert "continue 2_sft: goes on" in out and "moves runs/r/2_sft to .trash, without its checkpoints" in out
    _, out, _ = run("--until", "2_sft")
    assert "2_sft: goes on from its last checkpoint (max_steps: 2 -> 5), on the schedule of the new total" in out
    assert out.count("earlier output was moved to runs/r/.trash/") == out.count(".trash") == 1
    assert times()["2_sft"] == 1 and checkpoint.exists() and trashed() == ["2_sft/ran.txt", "run.json"]
    assert Path("runs/r/logs/2_sft.log").read_text().count("$ ") == 2
    run()
    assert changed(before) == {"2_sft", "3_reward"}
    assert trashed() == ["2_sft/ran.txt", "3_reward/ran.txt", "logs/3_reward.log", "run.json", "run.json"]
    before = identities()
    run()
    assert changed(before) == set()


def test_status_of_a_finished_run_and_after_a_change(
    folder: Path, run: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    run()
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    title, *lines, last = status(capfd)
    assert title == "runs/r: recipe" and last == "all steps are done"
    assert [line.split()[:2] for line in lines] == [[name, "done"] for name in read_names()]
    configure(folder, "2_sft", num_train_epochs=5)
    *_, sft, reward, last = status(capfd)
    assert re.match(
        r"2_sft +out of date +\d\.\d s +its configuration changed \(num_train_epochs: None -> 5\); about", sft
    )
    assert re.match(r"3_reward +out of date +\d\.\d s +depends on 2_sft; about", reward)
    assert "3 of 5 steps are done; the rest takes about " in last
    command = last.partition(": ")[2]
    assert command == "fourstage run recipe --output_dir runs/r"
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before
    run(*command.split()[3:])
    assert status(capfd)[-1] == "all steps are done"


def read_names() -> list[str]:
    return [step.name for step in read_plan(Path("recipe")).steps if step.kind != "report"]


def test_status_of_a_run_that_was_cut_short(folder: Path, run: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    configure(folder, "2_sft", fails=7)
    run("--seed", "3")
    (checkpoint := Path("runs/r/2_sft/checkpoint-3")).mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 4}')
    *_, sft, reward, last = status(capfd)
    assert re.match(r"2_sft +cut short +\d\.\d s +saved up to step 3 of 4; about", sft)
    assert re.match(r"3_reward +not run yet +about", reward)
    assert last.endswith(": fourstage run recipe --seed 3 --output_dir runs/r")


def test_status_of_several_seeds_and_of_what_is_not_a_run(run: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    run("--seeds", "0", "1")
    assert [line for line in status(capfd) if line.startswith("runs/r")] == [
        "runs/r/seed0: recipe, seed 0", "runs/r/seed1: recipe, seed 1",
    ]  # fmt: skip
    assert refused(capfd, "status", "recipe").startswith("RUN: recipe: is a recipe; its run is runs/r (")


def test_an_untrained_model_does_not_depend_on_how_it_is_trained(folder: Path, run: Runner) -> None:
    run()
    before = identities()
    configure(folder, "1_pretrain", learning_rate=0.002)
    run()
    assert changed(before) == {"1_pretrain", "2_sft", "3_reward"}


def test_a_changed_input_file_runs_its_step_again(folder: Path, run: Runner) -> None:
    Path("text.txt").write_text("one")
    configure(folder, "1_pretrain", dataset_name="text.txt")
    run()
    before = identities()
    Path("text.txt").write_text("two")
    run()
    assert changed(before) == {"1_pretrain", "2_sft", "3_reward"}


def test_comments_and_the_order_of_fields_do_not_matter(folder: Path, run: Runner) -> None:
    run()
    before = identities()
    path = folder / "1_pretrain.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text("# a comment\n" + yaml.safe_dump(dict(reversed(values.items())), sort_keys=False))
    run()
    assert changed(before) == set()


def test_until_stops_and_a_run_without_it_continues(run: Runner) -> None:
    run("--until", "1_pretrain")
    before = identities()
    assert set(before) == {"0_data", "0_random", "1_pretrain"}
    run()
    assert changed(before) == {"2_sft", "3_reward"}


def test_outputs_of_outdated_inputs_are_made_again_later(run: Runner) -> None:
    run()
    before = identities()
    run("--force", "pretrain", "--until", "pretrain")
    assert changed(before) == {"1_pretrain"}
    run()
    assert changed(before) == {"1_pretrain", "2_sft", "3_reward"}


def test_from_runs_a_step_and_all_after_it(run: Runner) -> None:
    run()
    before = identities()
    run("--from", "sft")
    assert changed(before) == {"2_sft", "3_reward"}


def test_from_refuses_a_step_whose_inputs_have_not_been_made(run: Runner) -> None:
    code, _, err = run("--from", "2_sft")
    assert code == 2
    assert "--from: 1_pretrain: is needed first (has not run yet)" in err
    assert not Path("runs").exists()


def test_force_without_names_runs_all(run: Runner) -> None:
    run()
    before = identities()
    run("--force")
    assert changed(before) == ALL
    before = identities()
    run("--force", "--from", "sft")
    assert changed(before) == {"2_sft", "3_reward"}


def test_a_step_whose_output_is_gone_runs_again(run: Runner) -> None:
    run()
    before = identities()
    Path("runs/r/2_sft/ran.txt").unlink()
    Path("runs/r/2_sft").rmdir()
    run()
    assert changed(before) == {"2_sft", "3_reward"}


def test_data_corrected_by_hand_are_kept_and_what_learned_from_them_runs_again(run: Runner) -> None:
    run()
    before = identities()
    Path("runs/r/data/label.txt").write_text("the other one")
    _, out, _ = run("--dry-run")
    assert "skip 0_data: finished" in out and "run 1_pretrain: the data of 0_data were changed" in out
    run()
    assert changed(before) == ALL - {"0_data", "0_random"}
    assert Path("runs/r/data/label.txt").read_text() == "the other one"
    before = identities()
    run()
    assert changed(before) == set()


def test_dry_run_prints_why_and_writes_nothing(folder: Path, run: Runner) -> None:
    code, out, _ = run("--dry-run")
    assert code == 0
    assert "run 2_sft: has not run yet" in out
    assert not Path("runs").exists()
    run()
    configure(folder, "2_sft", num_train_epochs=3)
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    _, out, _ = run("--dry-run")
    assert "skip 1_pretrain: finished" in out
    assert "run 3_reward: depends on 2_sft" in out
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before


def test_output_dir_moves_every_path(run: Runner) -> None:
    run("--output_dir", "elsewhere/s")
    assert times("elsewhere/s") == {"0_random": 1, "1_pretrain": 1, "2_sft": 1, "3_reward": 1, "data": 1}
    assert "dataset_name=elsewhere/s/data" in Path("elsewhere/s/2_sft/ran.txt").read_text()
    assert not Path("runs").exists()


def test_a_run_that_was_moved_is_still_finished(run: Runner) -> None:
    run()
    Path("runs/r").rename("moved")
    _, out, _ = run("--output_dir", "moved")
    assert "$ " not in out


def test_the_seed_reaches_every_step_and_is_a_change(run: Runner) -> None:
    run("--seed", "1")
    before = identities()
    assert all("seed=1" in path.read_text() for path in Path("runs/r").glob("*/ran.txt"))
    assert json.loads(Path("runs/r/run.json").read_text())["seed"] == 1
    _, out, _ = run("--seed", "2")
    assert changed(before) == ALL
    assert out.startswith("replaces the run of seed 1, which is moved to runs/r/.trash/")
    assert "--output_dir runs/r/seed2 would keep both" in out
    assert "earlier output was moved to runs/r/.trash/" in out
    _, out, _ = run("--seed", "3", "--force")
    assert out.startswith("replaces the run of seed 2, which is deleted; --output_dir runs/r/seed3 would keep both")
    assert "replaces" not in run("--seed", "3")[1] and "replaces" not in run("--output_dir", "new", "--seed", "1")[1]


def test_a_failing_step_ends_the_run_with_its_message_and_code(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    code, out, err = run()
    assert code == 7
    assert err == "the step's own message\n"
    assert "2_sft failed with exit code 7" in out
    assert "3_reward" not in times()


def test_a_step_whose_push_failed_is_complete_and_the_run_goes_on(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=3)
    _, out, _ = run()
    assert "2_sft was not pushed to the Hub, which is tried again at the end" in out and times()["3_reward"] == 1
    assert run()[0] == 0 and times()["2_sft"] == 1


def test_an_interrupted_step_resumes_from_what_it_saved(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    run()
    before = identities()
    code, out, _ = run()
    assert code == 0
    assert "2_sft: was interrupted" in out
    assert times()["2_sft"] == 2
    assert changed(before) == {"3_reward"}


def test_an_interrupted_step_that_is_forced_starts_from_the_beginning(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    run()
    _, out, _ = run("--force", "sft")
    assert "2_sft: was interrupted, but asked to run again" in out and times()["2_sft"] == 1


def test_the_peak_memory_of_a_step_is_recorded_over_all_of_its_parts(folder: Path, run: Runner) -> None:
    def peak() -> int:
        return int(json.loads(path.read_text())["steps"]["2_sft"]["peak_memory"])

    path = Path("runs/r/run.json")
    for before, expected in ((10**15, 10**15), (None, None)):
        configure(folder, "2_sft", fails=7)
        run("--force", "2_sft")
        # A fresh start forgets what was before.
        assert 10**6 < peak() < 10**12
        record = json.loads(path.read_text())
        record["steps"]["2_sft"]["peak_memory"] = before
        # Earlier releases did not record it.
        if before is None:
            del record["steps"]["2_sft"]["peak_memory"]
        path.write_text(json.dumps(record))
        run()
        assert times()["2_sft"] == 2
        assert peak() == expected or (expected is None and 10**6 < peak() < 10**12)


def test_an_interrupted_step_whose_configuration_changed_starts_from_the_beginning(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    run()
    configure(folder, "2_sft", fails=0)
    run()
    assert times()["2_sft"] == 1


def test_a_directory_that_the_runner_did_not_write_is_kept(run: Runner) -> None:
    Path("runs/r/2_sft").mkdir(parents=True)
    Path("runs/r/2_sft/trained_by_hand").touch()
    run()
    assert Path("runs/r/2_sft/trained_by_hand").exists()


def test_tokens_are_not_written_to_disk(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", hub_token="hf_secret")
    run()
    assert "hf_secret" not in Path("runs/r/run.json").read_text()


def test_the_machine_of_each_step_is_recorded(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    run()
    path = Path("runs/r/run.json")
    record = json.loads(path.read_text())
    for entry in record["steps"].values():
        assert entry["hardware"]["cores"] >= 1 and entry["hardware"]["system"]
        assert {"python", "torch", "transformers", "trl"} <= set(entry["versions"])
        assert "commit" in entry
        entry["hardware"] = {"system": "another machine"}
    path.write_text(json.dumps(record))
    run()
    systems = {name: entry["hardware"]["system"] for name, entry in json.loads(path.read_text())["steps"].items()}
    assert systems["1_pretrain"] == "another machine", "it was not run again"
    assert systems["2_sft"] != "another machine", "its last part ran here"


def test_a_finished_step_whose_module_was_renamed_is_skipped(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    for name, kind in list(STAGES.items()):
        if kind.module:
            monkeypatch.setitem(STAGES, name, replace(kind, module=f"renamed.{name}"))
    code, out, _ = run()
    assert code == 0 and "$ " not in out
    assert out.count("finished, skipped") == len(ALL)


def test_a_step_that_exits_with_0_but_without_its_product_has_failed(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", vanishes=True)
    code, out, _ = run()
    assert code == 1
    assert "2_sft failed: it ended without writing runs/r/2_sft" in out
    assert "3_reward" not in times()
    assert json.loads(Path("runs/r/run.json").read_text())["steps"]["2_sft"]["finished_at"] is None


def test_a_model_is_complete_once_its_configuration_and_its_weights_exist(folder: Path) -> None:
    step = next(step for step in read_plan(folder).steps if step.name == "2_sft")
    step.output.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        assert not step.is_complete
        (step.output / name).touch()
    assert step.is_complete


def test_the_commands_of_a_recipe_are_those_that_a_user_types(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dry-run", "--until", "sft", "--num_processes", "2", "--output_dir", "x"]
    assert main(["run", "recipe", *argv]) == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    launch = "accelerate launch --config_file accelerate_config.yaml --num_processes 2 -m"
    pretrain = "--config recipe/1_pretrain.yaml --output_dir x"
    sft = "--config recipe/2_sft.yaml --output_dir x/2_sft"
    assert shown == [
        "python -m recipes.data --config recipe/0_data.yaml --output_dir x/data",
        f"python -m recipes.untrained {pretrain}/0_random --dataset_name x/data",
        "fourstage evaluate x --stage 0_random",
        f"{launch} recipes.pretrain {pretrain}/1_pretrain --dataset_name x/data",
        "fourstage evaluate x --stage 1_pretrain",
        f"{launch} recipes.sft {sft} --model_name_or_path x/1_pretrain --dataset_name x/data",
        "fourstage evaluate x --stage 2_sft",
        "fourstage report x",
    ]


def test_steps_of_one_number_run_in_the_order_of_training(folder: Path) -> None:
    for name in ("3_ppo", "3_preferences", "0_tokenizer"):
        (folder / f"{name}.yaml").write_text(f"output_dir: runs/r/{name}")
    names = [step.name for step in read_plan(folder).steps if step.kind not in ("evaluate", "report")]
    assert names == [
        "0_data",
        "0_tokenizer",
        "0_random",
        "1_pretrain",
        "2_sft",
        "3_preferences",
        "3_reward",
        "3_ppo",
    ]


def test_smoke_is_two_steps_of_a_miniature_beside_the_run(folder: Path) -> None:
    configure(folder, "1_pretrain", max_steps=5000, max_train_samples=100)
    plan = read_plan(folder, smoke=True)
    assert plan.run_dir == Path("runs/r-smoke")
    arguments = {step.name: " ".join(step.arguments) for step in plan.steps}
    assert "--max_steps 2" in arguments["1_pretrain"]
    assert "--max_train_samples" not in arguments["1_pretrain"]
    assert "--hidden_size 64" in arguments["0_random"]
    assert "--limit" in arguments["evaluate_2_sft"]
    assert all(step.output.parts[:2] == ("runs", "r-smoke") for step in plan.steps)


def test_lists_of_paths_move_with_the_run(folder: Path) -> None:
    values = {"output_dir": "runs/r/4_grpo", "reward_funcs": ["correctness", "runs/r/3_reward"]}
    (folder / "4_grpo.yaml").write_text(yaml.safe_dump(values))
    step = next(step for step in read_plan(folder, Path("x")).steps if step.name == "4_grpo")
    assert " ".join(step.arguments).endswith("--reward_funcs correctness x/3_reward")
    assert step.needs == ("3_reward",)
