"""A Hub for each test, and the real clients of this process pointed at it."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.helpers.hub_server import Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with one user, alice, whose token is in use, and an empty cache."""
    server = Hub()
    use(server, monkeypatch, tmp_path / "cache")
    yield server
    close_session()
    server.close()


def use(server: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = "hf_alice") -> None:
    """Point the clients of this process at a server. They wait a thousandth as long before they try again."""
    for name, value in server.environment(token).items():
        monkeypatch.setenv(name, value)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        ("ENDPOINT", server.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", token is None),
        ("HF_HUB_CACHE", str(cache)),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "_whoami_cache", {})
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    sleep = huggingface_hub.utils._http.time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: sleep(seconds / 1000))
    close_session()
