"""taskfactory.sandboxing: off means taskvm is never loaded; on means a sandbox or nothing."""

import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from taskfactory.agents.place import Refusal
from taskfactory.errors import EnvironmentLost, EnvironmentUnavailable, UnsafePathError
from taskfactory.sandboxconfig import SandboxConfig, SandboxSecret
from taskfactory.sandboxing import keep_patch, open_place, read_refusals
from taskvm import Sandbox
from taskvm.errors import (
    CheckpointError,
    HostError,
    ImageError,
    SandboxLostError,
    TaskvmError,
    UnavailableError,
)

RUN_WITHOUT = """
import asyncio, sys
from pathlib import Path
import taskfactory.cli
from taskfactory.sandboxconfig import SandboxConfig
from taskfactory.sandboxing import open_place

async def main():
    opening = open_place(SandboxConfig(), Path("/tmp"), audit_path=Path("/nowhere"), say=print)
    async with opening as place:
        assert not place.sandboxed
        assert (await place.operations.stat("/tmp")).kind == "dir"

asyncio.run(main())
print([name for name in sys.modules if name.split(".")[0] in ("taskvm", "rich", "starlette")])
"""


def test_with_the_sandbox_off_taskvm_is_never_imported() -> None:
    done = subprocess.run([sys.executable, "-c", RUN_WITHOUT], capture_output=True, text=True)

    assert done.stdout.strip() == "[]", done.stderr


async def enter(config: SandboxConfig, workspace: Path, **environ: str) -> bool:
    """Return whether the place is sandboxed."""
    said: list[str] = []
    opening = open_place(
        config, workspace, audit_path=workspace.parent / "audit", say=said.append, environ=environ
    )
    async with opening as place:
        return place.sandboxed


async def test_a_secret_without_a_value_refuses_the_task_and_names_the_variable(
    tmp_path: Path,
) -> None:
    config = SandboxConfig(
        enabled=True,
        allowed_hosts=("a.test",),
        secrets={
            "T": SandboxSecret(hosts=("a.test",), env_var="MY_TOKEN"),
            "U": SandboxSecret(hosts=("a.test",), env_var="OTHER"),
        },
        on_unavailable="host",
    )

    with pytest.raises(EnvironmentUnavailable, match="MY_TOKEN"):
        await enter(config, tmp_path, OTHER="value-of-other")


async def test_a_secret_that_the_engine_refuses_refuses_the_task(tmp_path: Path) -> None:
    """A shape that could be guessed."""
    secret = SandboxSecret(hosts=("a.test",), env_var="T", shape="ghp_***")
    config = SandboxConfig(enabled=True, allowed_hosts=("a.test",), secrets={"T": secret})

    with pytest.raises(EnvironmentUnavailable, match="at least 16"):
        await enter(config, tmp_path, T="value-of-the-token")


async def test_without_qemu_the_task_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(EnvironmentUnavailable, match="Nothing was run on the host"):
        await enter(SandboxConfig(enabled=True), tmp_path)


async def test_without_qemu_the_users_own_file_may_choose_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert not await enter(SandboxConfig(enabled=True, on_unavailable="host"), tmp_path)


@pytest.mark.parametrize("image", ["nosuch", "another/path"])
async def test_an_image_that_cannot_be_used_never_leads_to_the_host(
    tmp_path: Path, image: str
) -> None:
    config = SandboxConfig(enabled=True, image_path=image, on_unavailable="host")

    with pytest.raises(EnvironmentUnavailable, match="find "):
        await enter(config, tmp_path)


@pytest.mark.parametrize(
    "failure",
    [
        HostError("make the memory file ram", "512 MiB are needed and 0 MiB are free"),
        ImageError("build an image", "the archive does not answer"),
        CheckpointError("use the checkpoint x", "its disk was changed"),
        SandboxLostError("start a guest", "the virtual machine ended"),
    ],
)
async def test_what_an_earlier_guest_may_have_brought_about_never_leads_to_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: TaskvmError
) -> None:
    """A full disk, for one: a guest can fill it through its mount."""
    monkeypatch.setattr("taskvm.Sandbox.create", failing(failure))

    with pytest.raises(EnvironmentUnavailable, match="Nothing was run on the host"):
        await enter(SandboxConfig(enabled=True, on_unavailable="host"), tmp_path)


async def test_a_qemu_that_was_started_and_failed_never_leads_to_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host that guests keep busy, or whose memory they fill, it does not come up."""
    failure = UnavailableError("start qemu", "QEMU did not come up (no answer)")
    monkeypatch.setattr("taskvm.Sandbox.create", failing(failure))

    with pytest.raises(EnvironmentUnavailable, match="did not come up"):
        await enter(SandboxConfig(enabled=True, on_unavailable="host"), tmp_path)


def failing(error: TaskvmError) -> Callable[..., AbstractAsyncContextManager[Sandbox]]:
    @asynccontextmanager
    async def create(**options: object) -> AsyncIterator[Sandbox]:
        raise error
        yield

    return create


async def test_a_mistake_in_the_settings_never_leads_to_the_host(tmp_path: Path) -> None:
    config = SandboxConfig(enabled=True, allowed_hosts=("*.co.uk",), on_unavailable="host")

    with pytest.raises(EnvironmentUnavailable):
        await enter(config, tmp_path)


async def test_a_certificate_that_an_agent_can_write_is_not_trusted(tmp_path: Path) -> None:
    config = SandboxConfig(enabled=True, extra_ca_files=(str(tmp_path / "ca.pem"),))

    with pytest.raises(UnsafePathError, match="CA file"):
        await enter(config, tmp_path)


async def test_a_checkpoint_that_is_not_there_refuses_the_task(tmp_path: Path) -> None:
    """It is never ignored, and never a reason to run on the host: it may have been forged."""
    config = SandboxConfig(enabled=True, checkpoint_path="nosuch", on_unavailable="host")

    with pytest.raises(EnvironmentUnavailable, match="find the checkpoint .*nosuch"):
        await enter(config, tmp_path)


async def test_a_checkpoint_that_an_agent_can_write_is_not_started_from(tmp_path: Path) -> None:
    config = SandboxConfig(enabled=True, checkpoint_path=str(tmp_path / "mine.qcow2"))

    with pytest.raises(UnsafePathError, match="checkpoint"):
        await enter(config, tmp_path)


def test_a_patch_that_cannot_lie_beside_its_record_is_kept_below_tmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sandbox that the changes lie in is about to go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert keep_patch(b"diff", tmp_path) == tmp_path / "changes.patch"

    kept = keep_patch(b"diff", tmp_path / "gone")

    assert kept.read_bytes() == b"diff"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.is_relative_to(tmp_path)


def test_a_patch_that_can_be_kept_nowhere_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    with pytest.raises(EnvironmentLost, match="are lost. Free disk space"):
        keep_patch(b"diff", tmp_path / "gone")


def test_refusals_are_read_once_each_and_a_broken_line_is_skipped(tmp_path: Path) -> None:
    lines = [
        {"decision": "deny", "host": "evil.test", "port": 443, "reason": "no rule", "kind": "dns"},
        {"decision": "allow", "host": "a.test", "port": 443},
        {"decision": "deny", "host": "evil.test", "port": 443, "reason": "no rule"},
        {"decision": "deny", "address": "10.0.0.1", "reason": "private"},
    ]
    path = tmp_path / "audit.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"decision": "de')

    assert read_refusals(path) == (
        Refusal("evil.test:443", "no rule"),
        Refusal("10.0.0.1", "private"),
    )
    assert read_refusals(tmp_path / "missing") == ()
