"""What names the machine or holds a secret is not pushed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.hub.contents import without_paths


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("base_model:adapter:/tmp/run/2_sft", "base_model:adapter:2_sft"),
        ("--x=/tmp/run/2_sft, '/tmp/a'", "--x=2_sft, 'a'"),
        (json.dumps("failed:\n/tmp/run/2_sft\t/tmp/run/3_ppo"), json.dumps("failed:\n2_sft\t3_ppo")),
        (f"{Path.home()}/runs/x", "~/runs/x"),
        ("https://a.b/tmp/c and ./tmp/c and <b>x</tmp/c>", "https://a.b/tmp/c and ./tmp/c and <b>x</tmp/c>"),
        ("--hub_token hf_aSecret1", "--hub_token hf_***"),
        ("--hub_token hf_my-own_token", "--hub_token hf_***"),
    ],
)
def test_paths_and_tokens_are_replaced(monkeypatch: pytest.MonkeyPatch, text: str, public: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_my-own_token")
    assert without_paths(text) == public
