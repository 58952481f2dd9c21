"""Every test runs at home nowhere and offline: its own settings folder, no network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

LOCAL = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the user's home: history, conversations, models built by the CLI.

    HOME and XDG_CACHE_HOME stay, so that kernels are compiled once and not once per test.
    """
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MOELITE_HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return home


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections leave this machine in no test."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None):
            host = address[0] if isinstance(address, tuple) else str(address)
            if not str(host).startswith(LOCAL):
                raise OSError(f"tests are offline: no connection to {host}")
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
