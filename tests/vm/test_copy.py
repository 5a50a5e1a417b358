"""Content larger than memory, links, modes, and trees between host and guest (taskvm.filestream, taskvm.treecopy)."""

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.peak import printed_by
from tests.support.small_disk import MIB, small_disk
from tests.support.waiting import PATIENCE_S

from taskvm import CopyError, CopyLimits, Files, GuestError, HostError, Sandbox, UsageError

pytestmark = pytest.mark.vm
BOTH_SURFACES = True


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of the host with modes, an odd name, an empty directory and links in and out of it."""
    root = tmp_path / "tree"
    (root / "src" / "empty").mkdir(parents=True)
    (root / "src" / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (root / "src" / "run.sh").chmod(0o750)
    Path(os.fsdecode(os.fsencode(root) + b"/odd \xff\nname")).write_bytes(b"odd")
    os.utime(root / "src" / "run.sh", ns=(10**18, 10**18 + 123))
    (root / "to-run").symlink_to("src/run.sh")
    (root / "to-outside").symlink_to("/etc/passwd")
    return root


def described(root: Path) -> dict[str, tuple[object, ...]]:
    """Each path below `root`: kind, permissions, content or target, and time of a file."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        mode = stat.S_IMODE(status.st_mode)
        if path.is_symlink():
            facts: tuple[object, ...] = ("link", str(path.readlink()))
        elif path.is_dir():
            facts = ("dir", mode)
        else:
            facts = ("file", mode, path.read_bytes(), status.st_mtime_ns)
        found[str(path.relative_to(root))] = facts
    return found


async def zeros(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // MIB):
        yield bytes(MIB)


# Streams.


# A program, so that nothing of the runner's hides its peak. The pieces all differ; no digest holds more than one.
STREAM = """
import asyncio, filecmp, hashlib, sys
from pathlib import Path
from taskvm import Sandbox
from tests.conftest import GUEST
from tests.support.peak import Peak

async def streamed(vm, pieces):
    sent, received, size = hashlib.sha256(), hashlib.sha256(), 0
    async def source():
        for number in range(pieces):
            piece = number.to_bytes(4, "big") * (1 << 18)
            sent.update(piece)
            yield piece
    await vm.files.write_stream("/var/tmp/large", source())
    async for piece in vm.files.open_read("/var/tmp/large"):
        received.update(piece)
        size += len(piece)
    return size >> 20, sent.digest() == received.digest()

async def copied(vm, pieces, folder):
    with (folder / f"{pieces}").open("wb") as file:
        for number in range(pieces):
            file.write(number.to_bytes(4, "big") * (1 << 18))
    await vm.files.copy_in(folder / f"{pieces}", "/var/tmp/copied")
    await vm.files.copy_out("/var/tmp/copied", folder / f"{pieces}.back")
    return filecmp.cmp(folder / f"{pieces}", folder / f"{pieces}.back", shallow=False)

async def main(folder):
    async with Sandbox.create(**GUEST) as vm:
        await streamed(vm, 4), await copied(vm, 4, folder)  # what is loaded at the first use is no growth
        peak = Peak()
        print(*await streamed(vm, GUEST["memory_mib"] + 32), peak.growth_mib())
        peak = Peak()
        print(await copied(vm, 64, folder), peak.growth_mib())

asyncio.run(main(Path(sys.argv[1])))
"""


def test_a_stream_is_written_and_read_without_being_held(tmp_path: Path) -> None:
    """More than the guest's memory passes both ways, and the host's grows by a few windows of 256 KiB only."""
    mib, same, streamed_mib, same_copy, copied_mib = printed_by(STREAM, str(tmp_path))

    assert (int(mib), same, same_copy) == (GUEST["memory_mib"] + 32, "True", "True")
    assert float(streamed_mib) < 20
    assert float(copied_mib) < 20


async def test_a_source_that_fails_leaves_the_old_content(vm: Sandbox) -> None:
    """What the source raised comes out, and neither the file nor its directory shows the attempt."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise KeyError("source")

    await vm.files.write_text("/tmp/d/file", "old")

    with pytest.raises(KeyError):
        await vm.files.write_stream("/tmp/d/file", broken())

    await vm.exec("while [ $(ls -A /tmp/d | wc -l) -gt 1 ]; do :; done", timeout_s=PATIENCE_S)
    assert [entry.name for entry in await vm.files.list("/tmp/d")] == ["file"]
    assert await vm.files.read_text("/tmp/d/file") == "old"


async def test_cancelled_writes_give_their_places_back(asynchronous_vm: Sandbox) -> None:
    """Forty writes from a source that never ends are cancelled; the agent's 32 places are free again."""

    async def endless() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    for number in range(40):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await asynchronous_vm.files.write_stream(f"/tmp/e/{number}", endless())

    await asyncio.gather(
        *(asynchronous_vm.files.write_text(f"/tmp/f/{number}", "x") for number in range(32))
    )
    assert len(await asynchronous_vm.files.list("/tmp/f")) == 32


async def test_a_full_disk_ends_a_stream_with_its_errno(vm: Sandbox) -> None:
    """The guest refuses in the middle; the caller hears it at once, although its source has not ended."""
    await vm.exec("mkdir /tmp/s && mount -t tmpfs -o size=1m none /tmp/s", user="root", check=True)

    with pytest.raises(GuestError) as caught:
        await vm.files.write_stream("/tmp/s/file", zeros(64 * MIB))

    assert caught.value.errno == 28


async def test_a_stream_may_be_left_early(vm: Sandbox) -> None:
    """aclosing frees the place at once; forty of them in a row do not run out."""
    for _ in range(40):
        async with contextlib.aclosing(vm.files.open_read("/bin/bash")) as pieces:
            first = await anext(pieces)

    assert first.startswith(b"\x7fELF")


# Links and modes.


async def test_links_and_modes(vm: Sandbox) -> None:
    """symlink and readlink keep the text; the link is the user's; chmod sets the mode and follows nothing."""
    await vm.files.write_text("/tmp/file", "x")
    await vm.files.symlink("../nowhere at all", "/tmp/link")
    await vm.files.chmod("/tmp/file", 0o4711)
    link = await vm.files.stat("/tmp/link", follow=False)
    file = await vm.files.stat("/tmp/file")

    assert await vm.files.readlink("/tmp/link") == "../nowhere at all"
    assert (link.uid, file.mode) == (file.uid, 0o4711)


async def test_chmod_is_not_led_to_another_users_file(vm: Sandbox) -> None:
    """A link in the path's place is ELOOP and what it leads to keeps its mode."""
    await vm.files.symlink("/etc/shadow", "/tmp/trap")
    before = (await vm.files.stat("/etc/shadow")).mode

    with pytest.raises(GuestError) as caught:
        await vm.files.chmod("/tmp/trap", 0o666)

    assert caught.value.errno == 40
    assert (await vm.files.stat("/etc/shadow")).mode == before


@pytest.mark.parametrize(("path", "number"), [("/etc/passwd", 17), ("/none/x", 2)])
async def test_a_link_replaces_nothing(asynchronous_vm: Sandbox, path: str, number: int) -> None:
    with pytest.raises(GuestError) as caught:
        await asynchronous_vm.files.symlink("/x", path)

    assert caught.value.errno == number


async def test_what_is_made_belongs_to_the_sandboxs_user(
    asynchronous_vm: Sandbox, tree: Path
) -> None:
    """Files, directories and the links themselves, when that is not root; what a link leads to stays."""
    files = Files(asynchronous_vm._guest.control, 1234, 1235)

    await files.copy_in(tree, "/tmp/theirs")
    await files.symlink("/etc/shadow", "/tmp/theirs/shadow")
    owners = await asynchronous_vm.exec(
        "find /tmp/theirs -printf '%U:%G\\n' | sort -u; stat -c %u /etc/shadow"
    )

    assert owners.stdout.split() == ["1234:1235", "0"]


# Trees.


async def test_a_tree_goes_in_and_comes_out_the_same(
    vm: Sandbox, tree: Path, tmp_path: Path
) -> None:
    """Names, permissions, times, contents and links survive the way there and back."""
    await vm.files.copy_in(tree, "/tmp/a/tree")
    ran = await vm.exec(
        "/tmp/a/tree/to-run && stat -c %u /tmp/a/tree/src /tmp/a/tree/to-outside; id -u"
    )
    await vm.files.copy_out("/tmp/a/tree", tmp_path / "back")

    assert described(tmp_path / "back") == described(tree)
    said, *owners, user = ran.stdout.split()
    assert (said, owners) == ("ran", [user, user])


async def test_a_tree_is_added_to_one_that_is_there(vm: Sandbox, tree: Path) -> None:
    """A second copy replaces files and links and keeps what else there is."""
    await vm.files.copy_in(tree, "/tmp/tree")
    await vm.files.write_text("/tmp/tree/src/more", "kept")
    (tree / "src" / "run.sh").write_text("changed")

    await vm.files.copy_in(tree, "/tmp/tree")

    assert await vm.files.read_text("/tmp/tree/src/run.sh") == "changed"
    assert await vm.files.read_text("/tmp/tree/src/more") == "kept"


async def test_copying_in_does_not_go_through_a_link_of_the_guests(vm: Sandbox, tree: Path) -> None:
    """A directory of the tree whose place in the guest is taken by a link is refused: its target stays empty."""
    await vm.exec("mkdir -p /tmp/t /tmp/elsewhere && ln -s /tmp/elsewhere /tmp/t/src", check=True)

    with pytest.raises(GuestError) as caught:
        await vm.files.copy_in(tree, "/tmp/t")

    assert caught.value.errno == 17
    assert await vm.files.list("/tmp/elsewhere") == []


async def test_a_single_file_and_a_single_link_are_copied(vm: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/shadow")
    await vm.files.copy_in("/etc/hostname", "/tmp/name")
    await vm.files.copy_in(tmp_path / "link", "/tmp/link")
    await vm.files.copy_out("/tmp/name", tmp_path / "name")

    assert (tmp_path / "name").read_bytes() == Path("/etc/hostname").read_bytes()
    assert await vm.files.readlink("/tmp/link") == "/etc/shadow"


async def test_of_a_link_that_is_named_comes_what_it_leads_to_in_the_guest(
    vm: Sandbox, tmp_path: Path
) -> None:
    """A file, through two links, and a directory, whose own links stay links."""
    await vm.exec(
        "mkdir -p /tmp/v1 && cd /tmp && echo guests >v1/file && chmod 750 v1/file && ln -s /etc/shadow v1/link"
        " && ln -s v1 latest && ln -s latest/file first && ln -s /tmp/first second",
        check=True,
    )

    await vm.files.copy_out("/tmp/second", tmp_path / "file")
    await vm.files.copy_out("/tmp/latest", tmp_path / "latest")

    copy = (tmp_path / "file").lstat()
    assert (stat.S_IFMT(copy.st_mode), stat.S_IMODE(copy.st_mode)) == (stat.S_IFREG, 0o750)
    assert (tmp_path / "file").read_text() == "guests\n"
    assert not (tmp_path / "latest").is_symlink()
    assert str((tmp_path / "latest" / "link").readlink()) == "/etc/shadow"


async def test_a_link_that_leads_nowhere_says_where(vm: Sandbox, tmp_path: Path) -> None:
    """Also one that leads to itself; the host's file of that name is not looked at."""
    (tmp_path / "here").write_text("the host's")
    await vm.files.symlink(str(tmp_path / "here"), "/tmp/astray")
    await vm.files.symlink("round", "/tmp/round")

    with pytest.raises(CopyError, match=f"leads to '{tmp_path}/here': No such file"):
        await vm.files.copy_out("/tmp/astray", tmp_path / "copy")
    with pytest.raises(CopyError, match="leads to 'round': Too many levels"):
        await vm.files.copy_out("/tmp/round", tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


async def test_nothing_that_exists_is_written_over(vm: Sandbox, tmp_path: Path) -> None:
    """A file, and a link that leads nowhere, are both in the way."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "absent")

    for name in ("file", "link"):
        with pytest.raises(UsageError, match="exists"):
            await vm.files.copy_out("/etc/hostname", tmp_path / name)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "mine"


async def test_a_full_disk_of_the_host_is_an_error_and_leaves_nothing(
    vm: Sandbox, tmp_path: Path
) -> None:
    """A file that does not fit, and a tree whose second file does not: half a copy is no copy."""
    await vm.exec("mkdir /tmp/t; head -c 6M /dev/zero | tee /tmp/t/a > /tmp/t/b", check=True)
    await vm.exec("head -c 20M /dev/zero > /tmp/large", check=True)

    with small_disk(tmp_path / "small", 8) as small:
        for path in ("/tmp/large", "/tmp/t"):
            with pytest.raises(HostError, match="No space left"):
                await vm.files.copy_out(path, small / "out")
            assert list(small.iterdir()) == []
        await vm.files.copy_out("/tmp/t/a", small / "out")
        assert (small / "out").stat().st_size == 6 * MIB


@pytest.mark.parametrize(
    ("making", "words"),
    [
        ("mkfifo /tmp/t/x", "type fifo"),
        ("mknod /tmp/t/x b 7 0", "type block"),
        ("cp /bin/true /tmp/t/x && chmod 4755 /tmp/t/x", "setuid"),
        ("touch /tmp/t/1 /tmp/t/2 /tmp/t/3 /tmp/t/4 /tmp/t/5", "more than 5 files"),
        ("head -c 2000000 /dev/zero > /tmp/t/x", "more than 1048576 bytes"),
        ("cd /tmp/t; for i in $(seq 140); do mkdir d && cd d; done", "directories deep"),
    ],
)
async def test_what_is_not_copied_is_named_and_nothing_is_left(
    asynchronous_vm: Sandbox, making: str, words: str, tmp_path: Path
) -> None:
    """Each refusal says what it is about; the host's directory is as before."""
    await asynchronous_vm.exec(f"mkdir /tmp/t && {making}", user="root", check=True)
    limits = CopyLimits(max_entries=5 if "touch" in making else 1000, max_bytes=MIB)

    with pytest.raises(CopyError, match=words):
        await asynchronous_vm.files.copy_out("/tmp/t", tmp_path / "out", limits=limits)

    assert list(tmp_path.iterdir()) == []


async def test_a_special_file_of_the_host_is_not_copied_in(vm: Sandbox, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(CopyError, match="fifo"):
        await vm.files.copy_in(tmp_path, "/tmp/t")


async def test_the_hosts_own_refusals_are_host_errors(vm: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        await vm.files.copy_out("/etc/hostname", tmp_path / "none" / "x")
    with pytest.raises(HostError, match="No such file"):
        await vm.files.copy_in(tmp_path / "none", "/tmp/x")
