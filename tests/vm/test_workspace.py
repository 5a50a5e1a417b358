"""A host directory at /workspace: real programs in the guest, judged by what is on the host."""

import os
import subprocess
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S

from taskvm import HostDir, Sandbox

pytestmark = pytest.mark.vm

SIZE = 10_000  # of each file in a repository
IDENTITY = "git config --global user.name A; git config --global user.email a@example.com; "


async def test_a_commit_made_in_the_guest_is_on_the_host(
    workspace: Path, vm_with_workspace: Sandbox
) -> None:
    """git init, commit, branch and merge work on the mount, and the host's git agrees."""
    script = IDENTITY + (
        "set -e; git init -q -b main .; echo one > file; git add .; git commit -qm one; "
        "git checkout -qb side; echo two >> file; git commit -qam two; git checkout -q main; "
        "git merge -q side; git gc -q; git status --porcelain; git fsck --strict"
    )

    done = await vm_with_workspace.exec(script, timeout_s=2 * PATIENCE_S)
    log = subprocess.run(
        ["git", "-C", workspace, "log", "--format=%s"], capture_output=True, text=True, check=True
    )

    assert done.ok, done.stderr
    assert log.stdout == "two\none\n"
    assert (workspace / "file").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("maker", ["guest", "host"])
async def test_gits_index_is_believed_on_both_sides(
    workspace: Path, vm_with_workspace: Sandbox, monkeypatch: pytest.MonkeyPatch, maker: str
) -> None:
    """`git status` in turns reads no file again on either side, whoever has made the repository or changed a file of
    it, and finds nothing in the index to mend. The files are so large that one that is read again shows in the bytes.
    """
    read: list[int] = []
    provider_read = HostDir.read

    def counted(provider: HostDir, node: int, offset: int, size: int) -> bytes:
        data = provider_read(provider, node, offset, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(HostDir, "read", counted)
    make = (
        f"mkdir d; for n in $(seq 200); do (echo $n; head -c {SIZE} /dev/zero) > d/f$n; done;"
        " git init -q .; git add ."
    )
    if maker == "guest":
        await vm_with_workspace.exec(make, check=True)
    else:
        subprocess.run(["sh", "-c", make], cwd=workspace, check=True)
    os.utime(workspace / ".git" / "index", (2e9, 2e9))  # else what is as young as it is read again
    index = (workspace / ".git" / "index").read_bytes()
    read.clear()

    for turn in range(3):
        seen = await vm_with_workspace.exec(
            "git -c safe.directory='*' status --porcelain | grep -c '^A  '", check=True
        )
        on_host, bytes_on_host = status_on_host(workspace)
        assert (seen.stdout, on_host.count("A  d/")) == ("200\n", 200)
        if turn:  # the host's git had nothing to learn either
            assert bytes_on_host - bytes_of_git() < 4 * len(index) + SIZE

    assert (workspace / ".git" / "index").read_bytes() == index
    # The index and git's own small files, each at most once for each run; none of the 200.
    assert len(read) < 20
    assert sum(read) < 4 * len(index) + SIZE
    read.clear()
    with (workspace / "d" / "f1").open("r+") as file:
        file.write("changed by the host\n")
    changed_s = "{}.{:09}".format(*divmod((workspace / "d" / "f1").stat().st_mtime_ns, 10**9))
    seen = await vm_with_workspace.exec(
        f"until [ $(stat -c %.9Y d/f1) = {changed_s} ]; do sleep 0.1; done;"
        " git -c safe.directory='*' status --porcelain | grep -v '^A  '",
        check=True,
    )
    assert seen.stdout == "AM d/f1\n"
    assert len(read) < 20
    assert sum(read) < 4 * len(index) + 3 * SIZE  # f1, for grep and for git


def status_on_host(workspace: Path) -> tuple[str, int]:
    """Return what git says on the host, and how many bytes it has read (rchar, proc(5))."""
    return git_on_host("-c", "safe.directory=*", "-C", str(workspace), "status", "--porcelain")


def bytes_of_git() -> int:
    """Return how many bytes git reads to do nothing: its libraries and its configuration."""
    return git_on_host("version")[1]


def git_on_host(*arguments: str) -> tuple[str, int]:
    with subprocess.Popen(["git", *arguments], stdout=subprocess.PIPE, text=True) as git:
        assert git.stdout is not None
        said = git.stdout.read()
        os.waitid(
            os.P_PID, git.pid, os.WEXITED | os.WNOWAIT
        )  # its account is there until it is reaped
        account = Path(f"/proc/{git.pid}/io").read_text()
    assert git.returncode == 0
    return said, int(account.split("rchar: ")[1].split()[0])


async def test_the_guests_files_belong_to_the_host_user(
    workspace: Path, vm_with_workspace: Sandbox
) -> None:
    """What the guest's user and its root write is the host user's, with the mode that was asked for."""
    await vm_with_workspace.exec("umask 022; echo x > mine; chmod 750 mine", check=True)
    await vm_with_workspace.exec("echo y > roots", user="root", check=True)

    assert (workspace / "mine").stat().st_mode & 0o7777 == 0o750
    assert {path.stat().st_uid for path in workspace.iterdir()} == {os.getuid()}


async def test_host_changes_show_in_the_guest(workspace: Path, vm_with_workspace: Sandbox) -> None:
    """A file that the host writes or replaces is read by the guest, although it may believe for an hour what it saw."""
    (workspace / "note").write_text("old")
    first = await vm_with_workspace.exec(["cat", "note"])
    (workspace / "new").write_text("replaced")
    (workspace / "new").rename(workspace / "note")
    second = await vm_with_workspace.exec(
        "until grep -q replaced note; do sleep 0.01; done; cat note"
    )

    assert (first.stdout, second.stdout) == ("old", "replaced")


async def test_an_editors_save_and_pythons_cache_work(
    workspace: Path, vm_with_workspace: Sandbox
) -> None:
    """Save by rename, imports with byte code, SQLite in WAL mode."""
    script = (
        "set -e; echo 'value = 41' > module.py; cp module.py .module.swp; "
        "sed -i s/41/42/ .module.swp; mv .module.swp module.py; "
        "python3 -c 'import module; assert module.value == 42'; ls __pycache__; "
        'python3 -c \'import sqlite3; c = sqlite3.connect("db"); '
        'c.execute("pragma journal_mode=wal"); c.execute("create table t (x)"); '
        'c.executemany("insert into t values (?)", [(i,) for i in range(100)]); c.commit(); c.close()\''
    )

    done = await vm_with_workspace.exec(script)

    assert done.ok, done.stderr
    assert (workspace / "module.py").read_text() == "value = 42\n"
    assert list((workspace / "__pycache__").iterdir())


async def test_large_files_keep_every_byte(workspace: Path, vm_with_workspace: Sandbox) -> None:
    """Sixteen megabytes written in the guest hash the same on the host."""
    done = await vm_with_workspace.exec(
        "head -c 16M /dev/urandom > big; sync big; sha256sum big | cut -d' ' -f1", check=True
    )
    host = subprocess.run(
        ["sha256sum", workspace / "big"], capture_output=True, text=True, check=True
    )

    assert host.stdout.split()[0] == done.stdout.strip()


async def test_a_read_only_mount_refuses_every_write(workspace: Path) -> None:
    """Not by the guest's mount flag alone: its root may remount, and still changes nothing."""
    (workspace / "file").write_text("safe")
    async with Sandbox.create(mounts={"/workspace": HostDir(workspace, mode="ro")}, **GUEST) as vm:
        read = await vm.exec(["cat", "/workspace/file"])
        tried = await vm.exec(
            "mount -o remount,rw /workspace; echo broken > /workspace/file; rm -f /workspace/file; "
            "touch /workspace/new; chmod 777 /workspace/file; mkdir /workspace/dir; "
            "mv /workspace/file /workspace/other; ln /workspace/file /workspace/hard",
            user="root",
        )

    assert read.stdout == "safe"
    assert not tried.ok
    assert [path.name for path in workspace.iterdir()] == ["file"]
    assert (workspace / "file").read_text() == "safe"


async def test_two_mounts_and_the_files_api_reach_the_host(tmp_path: Path) -> None:
    """Several mounts work side by side, also through typed file operations."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    async with Sandbox.create(
        mounts={"/workspace": HostDir(one), "/data/two": HostDir(two)}, **GUEST
    ) as vm:
        await vm.files.write_text("/workspace/a", "A")
        await vm.files.write_text("/data/two/b", "B")
        listed = [entry.name for entry in await vm.files.list("/data/two")]

    assert ((one / "a").read_text(), (two / "b").read_text()) == ("A", "B")
    assert listed == ["b"]


async def test_one_host_directory_serves_several_sandboxes(workspace: Path) -> None:
    """The same HostDir value can be given again, at once or later."""
    shared = HostDir(workspace)
    async with (
        Sandbox.create(mounts={"/workspace": shared}, **GUEST) as first,
        Sandbox.create(mounts={"/workspace": shared}, **GUEST) as second,
    ):
        await first.exec("echo from-first > note", check=True)
        seen = await second.exec(["cat", "note"])
    async with Sandbox.create(mounts={"/workspace": shared}, **GUEST) as third:
        again = await third.exec(["cat", "note"])

    assert seen.stdout == again.stdout == "from-first\n"


async def test_mapped_pages_are_on_the_host_after_close(workspace: Path) -> None:
    """What a program changed through a shared mapping, and never synced, is not lost."""
    (workspace / "mapped").write_bytes(b"." * 8192)
    async with Sandbox.create(mounts={"/workspace": HostDir(workspace)}, **GUEST) as vm:
        await vm.exec(
            'python3 -c \'import mmap; f = open("mapped", "r+b"); m = mmap.mmap(f.fileno(), 0); '
            'm[:5] = b"dirty"; import os; os._exit(0)\'',
            check=True,
        )

    assert (workspace / "mapped").read_bytes().startswith(b"dirty")
