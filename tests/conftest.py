"""What the tests of all layers share: sandboxes forked from the warm template, and the needs of this host.

The template is built once and kept in the user's cache; a sandbox then costs tenths of a second.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from taskvm import Sandbox

# What tests start guests with: small, so that several fit; the same for all, so that they share one template.
GUEST = {"cpus": 1, "memory_mib": 256}


@pytest.fixture(autouse=True)
def private_state(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Audit logs of tests do not land in the user's state directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))


@pytest.fixture
async def vm() -> AsyncIterator[Sandbox]:
    """A running sandbox without mounts or network."""
    from taskvm import Sandbox

    async with Sandbox.create(**GUEST) as sandbox:
        yield sandbox


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty directory of the host, to be mounted."""
    directory = tmp_path / "workspace"
    directory.mkdir()
    return directory


@pytest.fixture
async def vm_with_workspace(workspace: Path) -> AsyncIterator[Sandbox]:
    """A running sandbox with `workspace` at /workspace."""
    from taskvm import HostDir, Sandbox

    async with Sandbox.create(mounts={"/workspace": HostDir(workspace)}, **GUEST) as sandbox:
        yield sandbox
