"""Every module can be imported where the parts of POSIX that Windows lacks are missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import fresh
from tests.helpers.small_model import save_model

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("pipeline", "recipes")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__main__.py"
)
# Other libraries are imported first, because they look at `sys.platform` only when they are imported.
WITHOUT_POSIX = """
import importlib, json, os, signal, sys, time
import accelerate, datasets, evaluate, fastapi, filelock, huggingface_hub, math_verify, numpy, peft, psutil, torch
import krippendorff, transformers, uvicorn
import torch.distributed, transformers.trainer, trl
from trl import GRPOTrainer, RewardTrainer, SFTTrainer

for name in ("fcntl", "resource", "termios", "pwd", "grp", "pty"):
    # An entry of None makes `import` fail.
    sys.modules[name] = None
# torch loads the entry point of ours as soon as its launcher is imported, when nothing was missing yet.
for name in [name for name in sys.modules if name.split(".")[0] in ("pipeline", "recipes")]:
    del sys.modules[name]
for module, names in {
    os: "sched_getaffinity fork killpg geteuid getuid setsid posix_fallocate sysconf wait4 pread pwrite",
    signal: "SIGKILL SIGALRM alarm setitimer pthread_kill pthread_sigmask",
    time: "pthread_getcpuclockid",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "win32"
failed = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
print(json.dumps(failed))
"""


def test_every_module_can_be_imported_on_windows() -> None:
    """Windows lacks some modules and functions, which are removed here before the modules are imported."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, json.dumps(MODULES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_imports_leave_the_garbage_collector_alone() -> None:
    code = "import gc; before = gc.isenabled(), gc.get_threshold(); import recipes; "
    code += "assert (gc.isenabled(), gc.get_threshold()) == before"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# `python -m recipes.data` and its options: the first element of `sys.argv` tells `recipes` that a module is run.
RECIPE_WITH_COLLECTOR = """
import atexit, gc, runpy, sys

atexit.register(lambda: print(gc.isenabled(), file=sys.stderr))
sys.argv[0] = "-m"
import recipes

assert not gc.isenabled(), "modules are imported without it"
runpy.run_module("recipes.data", run_name="__main__")
"""


def test_the_garbage_collector_works_once_a_recipe_runs(tmp_path: Path) -> None:
    sizes = ["--size_mb", "0.1", "--sft_rows", "50", "--preference_rows", "50", "--reasoning_rows", "50"]
    command = [sys.executable, "-c", RECIPE_WITH_COLLECTOR, "--output_dir", str(tmp_path / "data"), *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr.splitlines()[-1] == "True", done.stderr


DEFAULTS = {
    # How often a thread of OpenMP polls before it sleeps.
    "GOMP_SPINCOUNT": "10000",
    # How many kernels oneDNN and its wrapper in torch keep.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
    # Whether transformers fetches kernels from the Hub.
    "USE_HUB_KERNELS": "NO",
}


LOADED_BEFORE = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model")
from pipeline.rl.ppo import PPOTrainer

model.train()
model.eval()
"""


def test_a_model_that_was_loaded_before_our_import_can_be_trained(tmp_path: Path) -> None:
    """transformers gives it kernels of the Hub, unless they are switched off, and asks for them in `train()`."""
    save_model(tmp_path / "model")
    fresh.run_python(LOADED_BEFORE, tmp_path)


@pytest.mark.parametrize(
    ("module", "users_choice", "expected"),
    [
        ("pipeline", {}, DEFAULTS),
        ("recipes", {}, DEFAULTS),
        ("recipes", {"OMP_WAIT_POLICY": "active"}, DEFAULTS | {"GOMP_SPINCOUNT": None}),
        (
            "recipes",
            {"GOMP_SPINCOUNT": "5", "LRU_CACHE_CAPACITY": "1024", "USE_HUB_KERNELS": "YES"},
            DEFAULTS | {"GOMP_SPINCOUNT": "5", "LRU_CACHE_CAPACITY": "1024", "USE_HUB_KERNELS": "YES"},
        ),
    ],
)
def test_an_import_sets_variables_of_the_libraries_that_the_user_has_not_set(
    module: str, users_choice: dict[str, str], expected: dict[str, str | None]
) -> None:
    """They are set before torch is imported, which reads them."""
    assert set(DEFAULTS) == set(fresh.OURS)
    variables = {name: value for name, value in fresh.environment().items() if name != "OMP_WAIT_POLICY"}
    code = f"import {module}, json, os, sys; print(json.dumps(['torch' in sys.modules, dict(os.environ)]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=variables | users_choice, capture_output=True, text=True, check=True)
    imports_torch, environment = json.loads(done.stdout)
    assert {name: environment.get(name) for name in DEFAULTS} == expected
    assert not imports_torch
