"""What the tests of all layers share: sandboxes forked from the warm template, and the needs of this host.

The template is built once and kept in the user's cache; a sandbox then costs tenths of a second.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.support.mount_namespace import make_mounts_private

if TYPE_CHECKING:
    from taskvm import Sandbox

# The first test that asks for the image of programs may have to build it.
BUILD_TIMEOUT_S = 600
# What tests start guests with: small, so that several fit; the same for all, so that they share one template.
GUEST = {"cpus": 1, "memory_mib": 256}


# A busy machine is no finding: no example has a deadline. CI judges a change by its own examples, the same in each run;
# everywhere else they are random, and what fails is kept in .hypothesis to be tried again.
settings.register_profile(
    "taskvm",
    deadline=None,
    derandomize="CI" in os.environ,
    # A fixture that all examples of a test share is meant to be shared.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("taskvm")


def pytest_configure() -> None:
    """Start from the same state however the run was started, as what tests start inherits it.

    `nohup` and a shell's `&` leave signals ignored, and programs keep to that; modes are made with the usual mask.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    make_mounts_private()  # before the first thread; tests that need it say so where it cannot be


@pytest.fixture(autouse=True)
def private_state(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Audit logs of tests do not land in the user's state directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module with BOTH_SURFACES makes each claim about `vm` for taskvm and for taskvm.sync."""
    if "vm" in metafunc.fixturenames and getattr(metafunc.module, "BOTH_SURFACES", False):
        metafunc.parametrize("vm", ["async", "sync"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever comes first builds the image of programs and the template, within limits of their own."""
    for item in items:
        names: list[str] = getattr(item, "fixturenames", [])
        if "programs_image" in names:
            item.add_marker(pytest.mark.timeout(BUILD_TIMEOUT_S), append=False)
        if item.get_closest_marker("vm") and "warm_template" not in names:
            names.insert(names.index("private_state") + 1, "warm_template")


@pytest.fixture(scope="session")
def warm_template() -> None:
    """The template that GUEST is forked from: its boot is no part of what a test waits for with a limit."""
    from taskvm import Sandbox

    async def start() -> None:
        async with Sandbox.create(**GUEST):
            pass

    asyncio.run(start())


@pytest.fixture(scope="session")
def programs_image() -> str:
    """The digest of an image with compilers and package managers (`PROGRAMS`), for `Sandbox.create(image=…)`."""
    from taskvm import ImageStore
    from tests.support.images import PROGRAMS

    return ImageStore().ensure(PROGRAMS, print).digest


@pytest.fixture
async def vm(request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    """A running sandbox without mounts or network; with BOTH_SURFACES also a synchronous one, awaited in threads."""
    from taskvm import Sandbox, sync
    from tests.support.blocking import dressed

    if getattr(request, "param", "async") == "async":
        async with Sandbox.create(**GUEST) as sandbox:
            yield sandbox
    else:
        async with dressed(await asyncio.to_thread(sync.Sandbox.create, **GUEST)) as sandbox:
            yield sandbox


@pytest.fixture
async def asynchronous_vm() -> AsyncIterator[Sandbox]:
    """A running sandbox for what only tasks can do."""
    from taskvm import Sandbox

    async with Sandbox.create(**GUEST) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The place of a supervisor of this module's own, which ends with it."""
    from taskvm import Supervisor

    directory = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKVM_RUNTIME", str(directory))
        yield directory
        asyncio.run(Supervisor().shut_down())


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
