"""`--help` of a recipe: ours and what the recipes set come first, the rest of the libraries' options behind it."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.training.entry import run
from recipes import sft

ROOT = Path(__file__).parents[2]


def test_help_is_short_and_help_all_is_complete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py"])
    run(sft.main, ["--help"])
    often = capsys.readouterr().out
    run(sft.main, ["--help-all"])
    everything = capsys.readouterr().out
    assert often.startswith("usage: python -m recipes.sft [--config FILE.yaml]")
    for name in ("dataset_name", "completion_column", "use_muon", "learning_rate", "output_dir"):
        assert f"\n  --{name} " in often
    for name in ("adam_epsilon", "dataset_num_proc", "use_dora"):
        assert f"\n  --{name} " in everything and f"\n  --{name} " not in often
    assert len(often.splitlines()) < 100 < len(everything.splitlines())
    assert max(map(len, often.splitlines())) <= 100


def test_help_of_a_recipe_that_trains_nothing_imports_no_torch() -> None:
    code = "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('recipes.data', run_name='__main__'); "
    code += "print('imported', *{'torch', 'transformers', 'trl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--size_mb" in done.stdout and done.stdout.splitlines()[-1] == "imported"
