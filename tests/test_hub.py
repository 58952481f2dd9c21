"""Hub ids and local paths; the hub itself is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moelite.errors import CheckpointError, DownloadError, OfflineError
from moelite.hub import resolve


class Hub:
    """Stands for snapshot_download."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.asked: dict[str, Any] = {}

    def __call__(self, repo: str, **options: Any) -> str:
        self.asked = {"repo": repo, **options}
        if self.error is not None:
            raise self.error
        bar = options["tqdm_class"](total=0, unit="B", name="huggingface_hub.snapshot_download")
        bar.total = 100
        bar.update(40)
        bar.update(60)
        files = options["tqdm_class"](total=3, desc="Fetching 3 files")
        files.update(1)
        transfer = options["tqdm_class"](
            total=9, unit="B", name="huggingface_hub.snapshot_download.transfer"
        )
        transfer.update(9)
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    (tmp_path / "model.safetensors").write_bytes(b"")
    return found


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error.\nRequest ID: 1")
    return error


def test_a_local_path_wins(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", offline=False) == Path("org/name")
    assert not hub.asked


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/3"])
def test_a_hub_id(hub: Hub, tmp_path: Path, revision: str | None) -> None:
    name = "acme/tiny-moe" + (f"@{revision}" if revision else "")
    assert resolve(name, offline=False) == tmp_path
    assert hub.asked["repo"] == "acme/tiny-moe"
    assert hub.asked["revision"] == revision
    assert hub.asked["local_files_only"] is False
    assert "*.safetensors" in hub.asked["allow_patterns"]
    assert not any("bin" in p or p == "*" for p in hub.asked["allow_patterns"])


def test_only_the_small_files(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").unlink()
    assert resolve("acme/tiny-moe", offline=False, weights=False) == tmp_path
    assert "*.safetensors" not in hub.asked["allow_patterns"]


def test_progress_counts_the_bytes_of_all_files(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int, str]] = []
    resolve("acme/tiny-moe", offline=False, progress=lambda *now: seen.append(now))
    assert seen == [(40, 100, "downloading"), (100, 100, "downloading")]
    resolve("acme/tiny-moe", offline=False)
    assert capfd.readouterr() == ("", "")


def test_a_repository_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="acme/tiny-moe holds no safetensors"):
        resolve("acme/tiny-moe", offline=False)


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere/at all", "a/b/c", "/no/such", "-x/y", "../x"]
)
def test_neither_folder_nor_hub_id(hub: Hub, name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve(name, offline=False)
    assert not hub.asked


def test_offline_and_not_cached(hub: Hub) -> None:
    hub.error = LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
    with pytest.raises(OfflineError, match="acme/tiny-moe") as caught:
        resolve("acme/tiny-moe", offline=True)
    assert caught.value.exit_code == 5
    assert hub.asked["local_files_only"] is True


def test_the_hubs_own_offline_mode(hub: Hub) -> None:
    hub.error = LocalEntryNotFoundError("outgoing traffic has been disabled")
    hub.error.__cause__ = OfflineModeIsEnabled("HF_HUB_OFFLINE")
    with pytest.raises(OfflineError, match="network is off"):
        resolve("acme/tiny-moe", offline=False)


def test_the_hub_does_not_answer(hub: Hub) -> None:
    hub.error = LocalEntryNotFoundError("Got: ConnectError")
    with pytest.raises(DownloadError, match="ConnectError") as caught:
        resolve("acme/tiny-moe", offline=False)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        (GatedRepoError, "licence"),
        (RepositoryNotFoundError, "spelling"),
        (RevisionNotFoundError, "after the @"),
        (HfHubHTTPError, "try again"),
    ],
)
def test_what_the_hub_answers(hub: Hub, kind: type[HfHubHTTPError], fix: str) -> None:
    hub.error = http_error(kind)
    with pytest.raises(DownloadError, match="404 Client Error") as caught:
        resolve("acme/tiny-moe", offline=False)
    assert fix in caught.value.fix


def test_a_connection_lost_on_the_way(hub: Hub) -> None:
    transport = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    hub.error = transport("peer closed connection")
    with pytest.raises(DownloadError, match="peer closed"):
        resolve("acme/tiny-moe", offline=False)
    hub.error = OSError(28, "No space left on device")
    with pytest.raises(DownloadError, match="No space left"):
        resolve("acme/tiny-moe", offline=False)


def test_offline_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OfflineError):
        resolve("acme/never-downloaded", offline=True)
