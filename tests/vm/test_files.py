"""Typed file operations in a real guest, beside running commands."""

import asyncio

import pytest

from taskvm import GuestError, Sandbox, UsageError

pytestmark = pytest.mark.vm
BOTH_SURFACES = True


async def test_what_is_written_is_read_back(vm: Sandbox) -> None:
    """Binary content of several megabytes survives, with its mode."""
    content = bytes(range(256)) * 20_000

    await vm.files.write_bytes("/tmp/deep/er/data.bin", content, mode=0o640)
    info = await vm.files.stat("/tmp/deep/er/data.bin")

    assert await vm.files.read_bytes("/tmp/deep/er/data.bin") == content
    assert (info.type, info.mode, info.size) == ("file", 0o640, len(content))


async def test_a_file_that_is_replaced_keeps_its_permissions(vm: Sandbox) -> None:
    """A script stays executable, unless a mode is named; set-user-id goes, as when a program writes."""
    await vm.exec(
        "mkdir /tmp/modes && cd /tmp/modes && touch script set private && ln -s script link && "
        "chmod 755 script && chmod 4711 set && chmod 600 private",
        check=True,
    )

    for name in ("script", "set", "private", "link", "new"):
        await vm.files.write_text(f"/tmp/modes/{name}", "text")
    await vm.files.write_text("/tmp/modes/named", "text", mode=0o700)
    await vm.files.write_text("/tmp/modes/named", "text", mode=0o640)
    modes = {entry.name: oct(entry.mode) for entry in await vm.files.list("/tmp/modes")}

    assert modes == {
        "link": "0o644", "named": "0o640", "new": "0o644", "private": "0o600", "script": "0o755", "set": "0o711"
    }  # fmt: skip


async def test_a_part_can_be_read(vm: Sandbox) -> None:
    """offset and length cut; past the end there is less, or nothing."""
    await vm.files.write_text("/tmp/text", "0123456789")

    assert await vm.files.read_bytes("/tmp/text", offset=3, length=4) == b"3456"
    assert await vm.files.read_bytes("/tmp/text", offset=8, length=100) == b"89"
    assert await vm.files.read_bytes("/tmp/text", offset=50) == b""


async def test_a_write_replaces_in_one_step(vm: Sandbox) -> None:
    """A reader that keeps reading sees whole versions only, and no temporary file stays."""
    await vm.exec("mkdir /tmp/atomic")
    await vm.files.write_text("/tmp/atomic/file", "a" * 300_000)
    watcher = await vm.spawn(
        "while [ ! -e /tmp/stop ]; do wc -c < /tmp/atomic/file; done | sort -u"
    )
    for size in (300_000, 600_000) * 5:
        await vm.files.write_text("/tmp/atomic/file", "b" * size)
    await vm.files.write_text("/tmp/stop", "")
    sizes = b"".join([data async for data in watcher.stdout]).split()
    names = [entry.name for entry in await vm.files.list("/tmp/atomic")]

    assert set(sizes) <= {b"300000", b"600000"}
    assert names == ["file"]


async def test_directories(vm: Sandbox) -> None:
    """mkdir, list, rename and remove do what they say."""
    await vm.files.mkdir("/tmp/a/b/c", parents=True)
    await vm.files.write_text("/tmp/a/one", "1")
    await vm.files.rename("/tmp/a/one", "/tmp/a/two")
    listed = [(entry.name, entry.type) for entry in await vm.files.list("/tmp/a")]
    await vm.files.remove("/tmp/a", recursive=True)

    assert listed == [("b", "dir"), ("two", "file")]
    assert not await vm.files.exists("/tmp/a")


async def test_remove_does_not_follow_symbolic_links(vm: Sandbox) -> None:
    """A recursive removal takes the link and leaves what it leads to."""
    await vm.exec(
        "mkdir -p /tmp/keep /tmp/gone; echo x > /tmp/keep/file; ln -s /tmp/keep /tmp/gone/link"
    )
    link = await vm.files.stat("/tmp/gone/link", follow=False)

    await vm.files.remove("/tmp/gone", recursive=True)

    assert (link.type, link.target) == ("symlink", "/tmp/keep")
    assert await vm.files.read_text("/tmp/keep/file") == "x\n"


@pytest.mark.parametrize(
    "call",
    [
        lambda vm: vm.files.write_text("/tmp/wrong", "x", mode="644"),
        lambda vm: vm.files.write_text("/tmp/wrong", "x", mode=0o10000),
        lambda vm: vm.files.write_text("/tmp/wrong", "x", mode=-1),
        lambda vm: vm.files.chmod("/tmp", -1),
        lambda vm: vm.files.mkdir("/tmp/wrong", mode=2**70),
        lambda vm: vm.files.read_bytes("/etc/passwd", offset=-1),
        lambda vm: vm.files.read_bytes("/etc/passwd", length=2**63),
    ],
)
async def test_numbers_that_mean_nothing_are_refused(vm: Sandbox, call: object) -> None:
    """They had the default instead, or all bits."""
    with pytest.raises(UsageError, match="is no number of 0"):
        await call(vm)  # type: ignore[operator]  # a lambda of the list above

    assert not await vm.files.exists("/tmp/wrong")


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda vm: vm.files.read_bytes("/tmp/none"), 2),
        (lambda vm: vm.files.read_bytes("/tmp"), 21),
        (lambda vm: vm.files.list("/etc/passwd"), 20),
        (lambda vm: vm.files.remove("/tmp/none"), 2),
        (lambda vm: vm.files.mkdir("/tmp"), 17),
        (lambda vm: vm.files.write_bytes("/proc/nope/x", b"x" * 2_000_000, parents=False), 2),
        (lambda vm: vm.files.rename("/etc/passwd", "/etc/hosts", replace=False), 17),
    ],
)
async def test_refusals_carry_the_guests_errno(vm: Sandbox, call: object, number: int) -> None:
    """The guest's own errno reaches the caller, also in the middle of a large write."""
    with pytest.raises(GuestError) as caught:
        await call(vm)  # type: ignore[operator]  # a lambda of the table above

    assert caught.value.errno == number


async def test_a_large_directory_is_listed_whole(vm: Sandbox) -> None:
    """Five thousand entries arrive, sorted."""
    await vm.exec("mkdir /tmp/many; cd /tmp/many; seq -w 5000 | xargs touch", check=True)
    names = [entry.name for entry in await vm.files.list("/tmp/many")]

    assert names == [f"{number:04}" for number in range(1, 5001)]


async def test_files_work_while_commands_run(vm: Sandbox) -> None:
    """Forty reads at once, beside a busy command, all answer."""
    busy = await vm.spawn("while :; do :; done")
    await vm.files.write_text("/tmp/shared", "content")
    contents = await asyncio.gather(*(vm.files.read_text("/tmp/shared") for _ in range(40)))
    await busy.kill_all()

    assert contents == ["content"] * 40


async def test_a_relative_path_is_refused(vm: Sandbox) -> None:
    """Guest paths are absolute; there is no current directory to guess."""
    with pytest.raises(UsageError):
        await vm.files.read_bytes("etc/passwd")
