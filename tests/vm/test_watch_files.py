"""Watches of the guest's files (taskvm.filewatch, taskvm.sync.filewatch): what is lost is said, and it ends."""

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S

from taskvm import FileChange, GuestError, Sandbox, SandboxLostError, UsageError, sync
from taskvm.filewatch import MAX_WATCHES, FileWatch

pytestmark = pytest.mark.vm
BOTH_SURFACES = True


async def until(watch: FileWatch, path: str) -> list[FileChange]:
    """All changes up to the first of `path`."""
    seen = []
    async with asyncio.timeout(PATIENCE_S):
        async for change in watch:
            seen.append(change)
            if change.path == path:
                break
    return seen


def told(changes: Iterable[FileChange]) -> list[tuple[str, ...]]:
    """Kind and path, the old one first for a move; without what a kernel may tell more than once."""
    return [
        (change.kind, *filter(None, [change.old_path]), change.path)
        for change in changes
        if change.kind not in ("modified", "attributes")
    ]


async def test_changes_of_a_directory_are_told_in_order(vm: Sandbox) -> None:
    """What a program makes, writes, renames and removes; what is below in another directory is not told."""
    await vm.exec("mkdir -p /tmp/w/sub", check=True)
    async with vm.files.watch("/tmp/w") as watch:
        await vm.exec(
            "cd /tmp/w && echo 1 > a && mv a b && ln -s b link && echo 2 > sub/deep && mkdir dir && rm b && "
            "mv link /tmp/gone && mv /tmp/gone back && touch end",
            check=True,
        )
        changes = await until(watch, "/tmp/w/end")

    assert told(changes) == [
        ("created", "/tmp/w/a"),
        ("written", "/tmp/w/a"),
        ("moved", "/tmp/w/a", "/tmp/w/b"),
        ("created", "/tmp/w/link"),
        ("created", "/tmp/w/dir"),
        ("deleted", "/tmp/w/b"),
        ("deleted", "/tmp/w/link"),
        ("created", "/tmp/w/back"),
        ("created", "/tmp/w/end"),
    ]
    assert [change.path for change in changes if change.is_dir] == ["/tmp/w/dir"]
    assert ("modified", "/tmp/w/a") in [(change.kind, change.path) for change in changes]


async def test_a_recursive_watch_follows_trees_that_come_move_and_go(vm: Sandbox) -> None:
    """Every file of a tree that is made at once is told; after a move by its new name; after it left, not."""
    await vm.exec("mkdir -p /tmp/w/old/deep /tmp/out", check=True)
    async with vm.files.watch("/tmp/w", recursive=True) as watch:
        await vm.exec("cd /tmp/w && mkdir -p n/e/w && touch n/e/w/file", check=True)
        await vm.exec("cd /tmp/w && mv old new && touch new/deep/file", check=True)
        await vm.exec(
            "cd /tmp/w && mv new /tmp/out && touch /tmp/out/new/deep/unseen end", check=True
        )
        changes = told(await until(watch, "/tmp/w/end"))

    assert {("created", f"/tmp/w/{path}") for path in ("n", "n/e", "n/e/w", "n/e/w/file")} <= set(
        changes
    )
    assert ("moved", "/tmp/w/old", "/tmp/w/new") in changes
    assert ("created", "/tmp/w/new/deep/file") in changes
    assert ("deleted", "/tmp/w/new") in changes
    assert not [change for change in changes if "unseen" in change[-1]]


async def test_a_mounted_folder_is_watched_for_what_the_guest_does(
    vm_with_workspace: Sandbox, workspace: Path
) -> None:
    (workspace / "src").mkdir()
    async with vm_with_workspace.files.watch("/workspace", recursive=True) as watch:
        await vm_with_workspace.exec("echo 1 > src/file && touch end", check=True)
        changes = told(await until(watch, "/workspace/end"))

    assert ("written", "/workspace/src/file") in changes


async def test_what_is_lost_is_said_and_the_watch_goes_on(asynchronous_vm: Sandbox) -> None:
    """Nobody reads while the guest's kernel runs out of room; memory is bounded, and later changes are told."""
    await asynchronous_vm.exec(
        "mkdir -p /tmp/w; echo 500 > /proc/sys/fs/inotify/max_queued_events",
        user="root",
        check=True,
    )
    async with asynchronous_vm.files.watch("/tmp/w", recursive=True) as watch:
        make = "import os\nfor n in range(12000): open(f'/tmp/w/{n:0100}', 'w')\nos.mkdir('/tmp/w/sub')"
        await asynchronous_vm.exec(
            ["python3", "-c", make], user="root", check=True, timeout_s=2 * PATIENCE_S
        )
        seen = []
        async with asyncio.timeout(PATIENCE_S):
            async for change in watch:
                seen.append(change)
                if change.kind == "overflow":
                    break
        await asynchronous_vm.exec(["touch", "/tmp/w/sub/end"], user="root", check=True)
        after = await until(watch, "/tmp/w/sub/end")

    assert seen[-1].path == "/tmp/w"
    assert len(seen) < 24000
    assert after[-1].kind == "created"


async def test_a_watch_ends_with_what_it_watches(vm: Sandbox) -> None:
    await vm.exec("mkdir -p /tmp/w; touch /tmp/file", check=True)
    async with vm.files.watch("/tmp/w") as watch, vm.files.watch("/tmp/file") as of_file:
        await vm.exec("rmdir /tmp/w; echo 1 > /tmp/file; rm /tmp/file", check=True)
        async with asyncio.timeout(PATIENCE_S):
            changes = [change async for change in watch]
            of_file_changes = [change async for change in of_file]

    assert told(changes) == [("deleted", "/tmp/w")]
    assert told(of_file_changes) == [("written", "/tmp/file"), ("deleted", "/tmp/file")]


async def test_closing_ends_an_iteration_and_leaves_room_for_others(vm: Sandbox) -> None:
    """The limit counts open watches; one that is closed frees its place here and in the guest."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(PATIENCE_S):
        watches = [
            await stack.enter_async_context(vm.files.watch("/tmp")) for _ in range(MAX_WATCHES)
        ]
        with pytest.raises(UsageError, match="16 watches are open"):
            await vm.files.watch("/tmp")
        waiting = asyncio.get_running_loop().create_task(anext(watches[0]))
        await asyncio.sleep(0)
        await watches[0].close()
        ended = await asyncio.gather(waiting, return_exceptions=True)
        async with vm.files.watch("/tmp") as watch:
            await vm.exec("touch /tmp/end", check=True)
            changes = await until(watch, "/tmp/end")

    assert isinstance(ended[0], StopAsyncIteration)
    assert told(changes) == [("created", "/tmp/end")]


async def test_closing_the_sandbox_ends_an_iteration_and_losing_it_is_an_error() -> None:
    async def changes(watch: FileWatch) -> list[FileChange]:
        return [change async for change in watch]

    async with (
        Sandbox.create(**GUEST) as vm,
        asyncio.timeout(PATIENCE_S),
        asyncio.TaskGroup() as group,
    ):
        closed = group.create_task(changes(await vm.files.watch("/tmp")))
        await vm.exec(["true"])
        await vm.close()
    async with Sandbox.create(**GUEST, max_duration_s=1.0) as vm, asyncio.timeout(PATIENCE_S):
        with pytest.raises(SandboxLostError, match="max_duration_s"):
            await changes(await vm.files.watch("/tmp"))

    assert closed.result() == []


async def test_a_watch_keeps_no_sandbox_awake() -> None:
    """It is paused as without; the next command wakes it, and its changes are told."""
    async with (
        Sandbox.create(**GUEST, idle_pause_s=0.2) as vm,
        vm.files.watch("/tmp") as watch,
        asyncio.timeout(PATIENCE_S),
    ):
        while not vm.statistics().paused:
            await asyncio.sleep(0.05)
        await vm.exec("touch /tmp/end", check=True)
        changes = await until(watch, "/tmp/end")

    assert told(changes) == [("created", "/tmp/end")]


async def test_what_cannot_be_watched_says_why(vm: Sandbox) -> None:
    with pytest.raises(GuestError) as missing:
        await vm.files.watch("/no/such/place")
    await vm.exec(
        "mkdir -p /tmp/many/{1..9}; echo 5 > /proc/sys/fs/inotify/max_user_watches",
        user="root",
        check=True,
    )
    with pytest.raises(GuestError) as many:
        await vm.files.watch("/tmp/many", recursive=True)

    assert (missing.value.errno, missing.value.call) == (2, "inotify_add_watch")
    assert many.value.errno == 28  # ENOSPC


def test_the_blocking_watch_is_the_same() -> None:
    with sync.Sandbox.create(**GUEST) as vm, vm.files.watch("/tmp", recursive=True) as watch:
        vm.exec("touch /tmp/a /tmp/end", check=True)
        seen = []
        for change in watch:
            seen.append(change)
            if change.path == "/tmp/end":
                break
        watch.close()
        seen += list(watch)

    assert told(seen)[0] == ("created", "/tmp/a")


async def test_unmounting_what_is_watched_is_its_end(vm_with_workspace: Sandbox) -> None:
    """IN_UNMOUNT: the folder is still on the host, and no longer in the guest."""
    async with vm_with_workspace.files.watch("/workspace") as watch, asyncio.timeout(PATIENCE_S):
        await vm_with_workspace.exec("umount /workspace", cwd="/", user="root", check=True)
        changes = [change async for change in watch]

    assert told(changes) == [("deleted", "/workspace")]
