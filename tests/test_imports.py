"""Every module can be imported where the parts of POSIX that Windows lacks are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_module_is_importable_without_the_modules_that_windows_lacks() -> None:
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


def test_the_garbage_collector_works_once_a_recipe_runs(tmp_path: Path) -> None:
    code = (
        "import atexit, gc, runpy, sys; atexit.register(lambda: print(gc.isenabled(), file=sys.stderr)); "
        "name, sys.argv = sys.argv[1], ['-m', *sys.argv[2:]]; import recipes; assert not gc.isenabled(); "
        "runpy.run_module(name, run_name='__main__')"
    )
    sizes = ["--size_mb", "0.1", "--sft_rows", "50", "--preference_rows", "50", "--reasoning_rows", "50"]
    command = [sys.executable, "-c", code, "recipes.data", "--output_dir", str(tmp_path / "data"), *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr.splitlines()[-1] == "True", done.stderr


@pytest.mark.parametrize(
    ("module", "own", "expected"),
    [
        ("pipeline", {}, "10000"),
        ("recipes", {}, "10000"),
        ("recipes", {"OMP_WAIT_POLICY": "active"}, ""),
        ("recipes", {"GOMP_SPINCOUNT": "5", "LRU_CACHE_CAPACITY": "1024", "USE_HUB_KERNELS": "YES"}, "5"),
    ],
)
def test_threads_wait_briefly_and_few_kernels_are_kept_and_none_fetched_unless_the_user_chose_how(
    module: str, own: dict[str, str], expected: str
) -> None:
    caches = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", "USE_HUB_KERNELS")
    others = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", *caches)
    variables = {name: value for name, value in os.environ.items() if name not in others}
    shown = ", ".join(f"os.environ.get('{name}', '')" for name in ("GOMP_SPINCOUNT", *caches))
    code = f"import sys, {module}, os; print({shown}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables | own, capture_output=True, text=True)
    kept = own.get("LRU_CACHE_CAPACITY", "128")
    assert done.stdout == f"{expected} 128 {kept} {own.get('USE_HUB_KERNELS', 'NO')} False\n"
