"""Providers behind a real guest's kernel, judged from the host's files."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from examples.dictionary import Dictionary
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S

from taskvm import (
    Hooks,
    HostDir,
    HostFile,
    Memory,
    Operation,
    Quota,
    ReadOnly,
    Router,
    Sandbox,
    Shadow,
)

pytestmark = pytest.mark.vm

SECRET = "hidden-value-6f1d"


@pytest.fixture
def project(workspace: Path) -> Path:
    """A project with secrets in it, one of them under a second name."""
    (workspace / "config" / "keys").mkdir(parents=True)
    (workspace / "src").mkdir()
    (workspace / "src" / "main.py").write_text("print('main')\n")
    for path in (".env", "config/keys/master", "server.pem"):
        (workspace / path).write_text(SECRET)
    os.link(workspace / ".env", workspace / "src" / "linked.txt")
    return workspace


# Each of these would show a hidden file, or put one there, if names alone were looked at.
ATTACKS = """
cat .env server.pem config/keys/master src/linked.txt .ENV ./src/../.env
ln .env shown; ln -s .env pointer; cat pointer; ln -s "$PWD/config/keys" way; cat way/master
mv config other; cat other/keys/master; mv .env shown; cp -a . /tmp/copy; cat /tmp/copy/.env
mkdir -p made/keys; echo planted > made/keys/master; mv config old; mv made config
echo planted > .env; echo planted > src/linked.txt; echo planted > x; mv x .env; ln src/main.py server.pem; mkdir .env
python3 -c 'import os; os.rename("src", ".env")'; rm -rf config; rm -f .env server.pem
find . -inum "$(stat -c %i src/main.py)"; tar cf /tmp/all.tar .; grep -r hidden-value . /tmp/copy /tmp/all.tar
mount --bind . /mnt; cat /mnt/.env; chroot . /bin/true; cat /proc/self/cwd/.env /proc/self/root/workspace/.env
"""


async def test_what_is_hidden_is_out_of_reach_of_every_program(project: Path) -> None:
    """Root of the guest tries it with ordinary programs; the host's files are what they were, and nothing was told."""
    hidden = Shadow(HostDir(project), [".env", "/config/keys/", "*.pem"])
    async with Sandbox.create(mounts={"/workspace": hidden}, **GUEST) as vm:
        tried = await vm.exec(["bash", "-c", ATTACKS], cwd="/workspace", user="root")
        listed = await vm.exec(["find", ".", "-name", ".*", "-o", "-name", "*.pem"])
        worked = await vm.exec("python3 src/main.py && echo new > src/new")

    assert SECRET not in tried.stdout + tried.stderr
    assert "planted" not in tried.stdout
    assert listed.stdout.split() == ["."]
    assert worked.stdout == "main\n"
    assert (project / "src" / "new").read_text() == "new\n"
    for path in (".env", "config/keys/master", "server.pem", "src/linked.txt"):
        assert (project / path).read_text() == SECRET


# A program with a file and a working directory of its own. It says when both are gone.
HOLDER = """
import os, sys
os.chdir("/workspace/work")
held = os.open("/workspace/tmp", os.O_RDWR)


def seen():
    told = []
    for look in (
        lambda: (os.posix_fadvise(held, 0, 0, os.POSIX_FADV_DONTNEED), os.pread(held, 100, 0))[1],
        lambda: open("inner", "rb").read(),
        lambda: os.listdir("."),
        lambda: open("/proc/self/cwd/inner", "rb").read(),
        lambda: (os.pwrite(held, b"planted", 0), os.fsync(held)),
        lambda: os.close(os.open("planted", os.O_CREAT | os.O_WRONLY)),
    ):
        try:
            told.append(look())
        except OSError:
            pass
    return told


assert len(seen()) == 6
os.unlink("planted")
os.pwrite(held, b"plain", 0)
print("held", flush=True)
sys.stdin.readline()
while seen():
    pass
print("gone", flush=True)
sys.stdin.readline()
print(*[seen() for _ in range(20)], flush=True)
sys.stdin.readline()
print(os.listdir("/workspace/shown"), os.listdir("."), open("/workspace/env").read(), os.pread(held, 9, 0))
"""


async def test_what_the_host_hides_by_moving_is_out_of_reach_of_who_has_it_open(
    workspace: Path,
) -> None:
    (workspace / "work").mkdir()
    for name in ("work/inner", "tmp"):
        (workspace / name).write_text("plain" * 20)
    hidden = Shadow(HostDir(workspace), [".env", "/secrets/"])
    async with (
        Sandbox.create(mounts={"/workspace": hidden}, **GUEST) as vm,
        await vm.spawn(["python3", "-c", HOLDER]) as process,
    ):
        assert await process.stdout.read() == b"held\n"
        (workspace / "tmp").rename(workspace / ".env")
        (workspace / "work").rename(workspace / "secrets")
        await process.write(b"\n")
        assert await process.stdout.read() == b"gone\n"

        (workspace / "secrets" / "planted").unlink(missing_ok=True)  # made before it was hidden
        (workspace / ".env").write_text(SECRET)
        (workspace / "secrets" / "inner").write_text(SECRET)
        await process.write(b"\n")
        told = await process.stdout.read()
        kept = (workspace / ".env").read_text()
        inside = [path.name for path in (workspace / "secrets").iterdir()]

        (workspace / ".env").write_text("plain")
        (workspace / ".env").rename(workspace / "env")
        (workspace / "secrets").rename(workspace / "shown")
        await process.write(b"\n")
        again = await process.stdout.read()

    assert told.decode().split() == ["[]"] * 20
    assert (kept, inside) == (SECRET, ["inner"])
    assert again == b"['inner'] ['inner'] plain b'plain'\n"


async def test_providers_nest_and_each_mount_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("data")
    mounts = {
        "/workspace": Memory(),
        "/data": ReadOnly(Shadow(HostDir(tmp_path / "data"), ["*.secret"])),
    }
    async with Sandbox.create(mounts=mounts, **GUEST) as vm:
        done = await vm.exec(
            "cat /data/file; echo x > /workspace/x && cat /workspace/x;"
            " mount -o remount,rw /data; echo x > /data/x; echo $?; rm /data/file; echo $?"
        )

    assert done.stdout == "datax\n1\n1\n"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["file"]


async def test_a_quota_holds_against_programs(workspace: Path) -> None:
    """By dd, a hole, fallocate and many files; what is removed can be used again."""
    limited = Quota(HostDir(workspace), limit_bytes=1 << 20, limit_files=20)
    async with Sandbox.create(mounts={"/workspace": limited}, **GUEST) as vm:
        await vm.exec(
            "cd /workspace; dd if=/dev/zero of=big bs=64k count=100; truncate -s 1T hole; fallocate -l 2M more;"
            " rm -f big hole more; for n in $(seq 100); do echo $n > f$n; done; cat f* > all"
        )
        kept = await vm.exec("df -B1 --output=size,iavail /workspace | tail -1")

    files = list(workspace.iterdir())
    assert len(files) == 20
    assert sum(path.stat().st_size for path in files) <= 1 << 20
    assert [int(number) for number in kept.stdout.split()][1] == 0


async def test_a_router_and_hooks_serve_a_guest(workspace: Path) -> None:
    """`mv` copies from one provider to the other, and what a hook refuses does not happen on the host."""
    seen: list[str] = []

    def guard(asked: Operation) -> None:
        seen.append(f"{asked.name} {asked.path}")
        if asked.path.endswith("/forbidden"):
            raise PermissionError(errno.EACCES, "EACCES")

    routed = Router({"/": HostDir(workspace), "/node_modules": Memory()})
    hooked = Hooks(routed, before=guard)
    async with Sandbox.create(mounts={"/workspace": hooked}, **GUEST) as vm:
        done = await vm.exec(
            "cd /workspace; mkdir -p a node_modules/b; echo data > a/file; mv a/file node_modules/b/;"
            " cat node_modules/b/file; ls; touch forbidden; rmdir node_modules; echo $?"
        )

    assert done.stdout == "data\na\nnode_modules\n1\n"
    assert sorted(path.name for path in workspace.rglob("*")) == ["a"]
    assert "create /a/file" in seen
    assert "create /node_modules/b/file" in seen


def test_the_command_line_hides_files(project: Path) -> None:
    taskvm = Path(sys.executable).with_name("taskvm")
    options = ["--mount", f"{project}:/workspace", "--hide", ".env", "--hide", "/config/", "-q"]
    options += ["--cpus", "1", "--memory", "256"]

    done = subprocess.run(
        [taskvm, "run", *options, "--", "sh", "-c", "ls -A; cat .env config"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )

    assert done.stdout.split() == ["server.pem", "src"]
    assert SECRET not in done.stdout + done.stderr


def test_the_command_line_gives_the_guest_files_of_its_own(project: Path) -> None:
    taskvm = Path(sys.executable).with_name("taskvm")
    options = ["--mount", ".:/workspace", "--private", ".env", "--hide", "/config/", "-q"]
    options += ["--cpus", "1", "--memory", "256"]

    done = subprocess.run(
        [taskvm, "run", *options, "--", "sh", "-c", "ls -A; echo guest > .env; cat .env"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )

    assert done.stdout.split() == ["server.pem", "src", "guest"]
    assert (project / ".env").read_text() == SECRET


def test_the_command_line_limits_what_the_guest_adds_to_the_hosts_disk(project: Path) -> None:
    taskvm = Path(sys.executable).with_name("taskvm")
    options = ["--mount", ".:/workspace", "--mount-limit", "2", "--hide", ".env", "-q"]
    options += ["--cpus", "1", "--memory", "256"]
    grow = "head -c 1M /dev/zero > kept; head -c 8M /dev/zero > large; fallocate -l 1G huge"

    done = subprocess.run(
        [taskvm, "run", *options, "--", "sh", "-c", f"{grow}; ls -A"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )

    assert done.stderr.count("quota exceeded") == 2
    assert ".env" not in done.stdout
    sizes = {path.name: path.stat().st_blocks * 512 for path in project.iterdir() if path.is_file()}
    assert sizes["kept"] == 1 << 20
    assert sizes["large"] + sizes.get("huge", 0) <= 1 << 20


async def test_a_provider_of_ones_own_serves_a_guest() -> None:
    """The example of the documentation, with a real kernel and real programs in front of it."""
    store = {"greeting": b"hello\n"}
    async with Sandbox.create(mounts={"/data": Dictionary(store)}, **GUEST) as vm:
        done = await vm.exec(
            "cd /data; ls; cat greeting; tr a-z A-Z < greeting > loud; echo more >> loud; mkdir d; rm greeting"
        )

    assert done.stdout == "greeting\nhello\n"
    assert store == {"loud": b"HELLO\nmore\n"}


def test_the_page_shows_the_example_as_it_is() -> None:
    root = Path(__file__).parent.parent.parent
    example = (root / "examples" / "dictionary.py").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^class Dictionary.*?\n\n\n", example, re.MULTILINE | re.DOTALL)

    assert shown.rstrip() in (root / "docs" / "files.md").read_text(encoding="utf-8")


async def test_a_single_file_is_shared_and_nothing_beside_it(tmp_path: Path) -> None:
    """A file below a mounted directory and one of the guest's own /etc; saves of the host by rename are seen."""
    beside = tmp_path / "home"
    beside.mkdir()
    (beside / "app.conf").write_text("port = 1\n")
    (beside / "id_ed25519").write_text(SECRET)
    (tmp_path / "project").mkdir()
    mounts = {
        "/etc/app/app.conf": HostFile(beside / "app.conf"),
        "/workspace": HostDir(tmp_path / "project"),
        "/workspace/app.conf": HostFile(beside / "app.conf", mode="ro"),
    }
    async with Sandbox.create(mounts=mounts, **GUEST) as vm:
        before = await vm.exec(
            "cat /workspace/app.conf; ls -A /etc/app;"
            " echo 'user = 2' >> /etc/app/app.conf; echo no > /workspace/app.conf;"
            " rm /etc/app/app.conf; sed -i s/1/3/ /etc/app/app.conf; mv /etc/app/app.conf /tmp; cat /etc/app/id_ed25519"
            " /etc/app/app.conf/../id_ed25519; grep -r hidden-value /etc/app /workspace"
        )
        written = (beside / "app.conf").read_text()
        (beside / "app.conf.new").write_text("port = 4\n")
        (beside / "app.conf.new").rename(beside / "app.conf")
        after = await vm.exec(
            "until grep -q 4 /etc/app/app.conf; do sleep 0.1; done; cat /etc/app/app.conf"
        )

    assert before.stdout == "port = 1\napp.conf\n"
    assert SECRET not in before.stdout + before.stderr
    assert before.stderr.count("busy") == 3
    assert written == "port = 1\nuser = 2\n"
    assert after.stdout == "port = 4\n"
    assert (tmp_path / "project" / "app.conf").read_text() == ""


def test_the_command_line_mounts_a_file(project: Path) -> None:
    taskvm = Path(sys.executable).with_name("taskvm")
    options = ["--mount", "./server.pem:/etc/tls/server.pem:ro", "-q", "--cpus", "1"]

    done = subprocess.run(
        [taskvm, "run", *options, "--memory", "256", "--", "sh", "-c", "cd /etc/tls; ls; cat *; echo > server.pem"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )  # fmt: skip

    assert done.stdout == f"server.pem\n{SECRET}"
    assert "Read-only" in done.stderr
