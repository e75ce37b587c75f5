"""Several machines: `--launcher` starts a launcher on each of them, here two on one machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pipeline.__main__ import main
from pipeline.runner.launcher import machine_arguments
from pipeline.runner.processes import run_command
from tests.helpers.small_model import ROOT, save_tokenizer

EACH = """
import os, subprocess, sys
nodes = [subprocess.Popen(sys.argv[1:], env=os.environ | {"MACHINE_RANK": str(rank)}) for rank in range(2)]
sys.exit(max(node.wait() for node in nodes))
"""
"""A stand-in for srun, with two nodes."""


NODE = """
import os, signal, sys, time
from pathlib import Path
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
name = os.environ["MACHINE_RANK"]
Path(f"started{name}").touch()
while not received and not Path("agreed").exists():
    time.sleep(0.01)
Path("agreed").touch()
time.sleep(0.3 * (1 + int(name)))
Path(f"saved{name}").write_text(str(len(received)))
sys.exit(143)
"""
"""A stand-in for a training: its processes agree to stop, and save for a while."""

SLURM = {
    "python": """trap 'echo stopped >> calls; exit 143' TERM; $STEP & [ $STEP = srun ] || touch started; wait $!""",
    "srun": "trap 'exit 137' TERM; touch started; until [ -e saved ]; do sleep 0.1; done; exit 143",
    "scancel": 'touch saved; echo "scancel $*" >> calls',
    "scontrol": 'echo "scontrol $*" >> calls',
    "squeue": "echo $STATE",
}
"""Stand-ins for the programs that slurm.sh calls; the runner runs one step."""


def test_a_launcher_finds_its_place_in_the_environment() -> None:
    assert machine_arguments({"SLURM_NODEID": "1"}) == [], "several nodes were not asked for"
    several = {"NUM_MACHINES": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "2000", "SLURM_NODEID": "3"}
    words = ["--num_machines", "4", "--machine_rank", "3", "--main_process_ip", "node1", "--main_process_port", "2000"]
    assert machine_arguments(several) == words
    assert machine_arguments(several | {"MACHINE_RANK": "2"})[3] == "2"


def test_only_launched_steps_are_started_by_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    launcher = ["--launcher", "srun --ntasks-per-node=1", "--num_processes", "64"]
    assert main(["run", "recipes/pocket", "--dry-run", *launcher]) == 0
    commands = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    started = [command for command in commands if command.startswith("srun --ntasks-per-node=1 python -m ")]
    assert [command.partition("-m recipes.")[2].split()[0] for command in started] == [
        *("pretrain", "sft", "preferences", "reward", "ppo", "grpo")
    ]
    assert all("--num_processes 64" in command for command in started)


def test_a_step_that_the_cluster_stops_has_not_failed() -> None:
    assert run_command([sys.executable, "-c", "raise SystemExit(143)"], os.environ, ())[:2] == (143, signal.SIGTERM)
    assert run_command([sys.executable, "-c", "raise SystemExit(2)"], os.environ, ())[:2] == (2, None)


def test_each_node_saves_when_the_first_is_asked_to_stop(tmp_path: Path) -> None:
    (tmp_path / "node.py").write_text(NODE)
    (tmp_path / "ssh").write_text('#!/bin/bash\nexec bash -c "${@: -1}"\n')
    (tmp_path / "ssh").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    command = ["bash", str(ROOT / "recipes" / "cluster" / "each_node.sh"), sys.executable, "node.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        while not ((tmp_path / "started0").exists() and (tmp_path / "started1").exists()):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
    assert process.returncode == 143
    assert [(tmp_path / f"saved{node}").read_text() for node in "01"] == ["1", "0"], "one signal, to the first node"


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="slurm.sh asks pgrep")
@pytest.mark.parametrize(
    ("step", "state", "calls"),
    [
        ("srun", "RUNNING", ["scancel --signal=TERM 7", "scontrol requeue 7"]),
        ("sleep 3", "RUNNING", ["stopped", "scontrol requeue 7"]),
        ("srun", "COMPLETING", ["scancel --signal=TERM 7"]),
    ],
)
def test_under_slurm_a_run_saves_and_is_queued_again_unless_it_is_cancelled(
    step: str, state: str, calls: list[str], tmp_path: Path
) -> None:
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "1"}
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "STEP": step, "STATE": state}
    job = subprocess.Popen(
        ["bash", ROOT / "recipes/cluster/slurm.sh", "recipes/base"], cwd=tmp_path, env=os.environ | variables | path
    )
    while job.poll() is None and not (tmp_path / "started").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    job.terminate()
    assert job.wait(20) == 143
    assert (tmp_path / "calls").read_text().splitlines() == calls


def test_two_launchers_train_one_model_together(tmp_path: Path) -> None:
    (tmp_path / "each.py").write_text(EACH)
    (tmp_path / "text.txt").write_text("The cat sat on the mat. A dog is not a cat.\n" * 400)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {
        "dataset_name": "text.txt",
        "tokenizer_name_or_path": save_tokenizer(tmp_path / "tokenizer"),
        **{"block_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_steps": 3},
        **{"per_device_train_batch_size": 2, "torch_compile": "false", "report_to": "none", "save_steps": 2},
        "output_dir": "out",
    }
    launch = ["--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes", "2", "-m", "recipes.pretrain"]
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    variables = {"NUM_MACHINES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "each.py", sys.executable, "-m", "pipeline.runner.launcher", *launch, *flags],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processes   2 on cpu" in done.stdout + done.stderr
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == 2 * 2 * 2 * 64, "both take part"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 32
