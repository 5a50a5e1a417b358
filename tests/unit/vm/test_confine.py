"""The supervisor that confines QEMU, tried with ordinary programs in QEMU's place."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm.vm.native import confine_binary

PYTHON = Path(sys.executable).resolve()


def run_confined(
    code: str, *options: str | Path, pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [str(confine_binary())]
    for path in ("/usr", "/lib", "/lib64", "/bin", PYTHON.parent.parent):
        command += ["--execute", str(path)]
    command += [str(option) for option in options]
    return subprocess.run(
        [*command, "--", str(PYTHON), "-I", "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        pass_fds=pass_fds,
    )


def test_a_file_that_is_not_named_cannot_be_opened(tmp_path: Path) -> None:
    """Neither the user's keys nor anything else outside the list is readable, even for root."""
    key = tmp_path / "id_ed25519"
    key.write_text("PRIVATE KEY")

    done = run_confined(f"print(open({str(key)!r}).read())")

    assert "PRIVATE KEY" not in done.stdout
    assert "PermissionError" in done.stderr


def test_memory_ends_at_the_limit() -> None:
    """What a guest makes QEMU allocate is bounded by the host's kernel."""
    grow = "blocks = [bytearray(10 << 20) for n in range({})]; print('grown')"

    within = run_confined(grow.format(10), "--data-size", str(300 << 20))
    beyond = run_confined(grow.format(60), "--data-size", str(300 << 20))

    assert within.stdout == "grown\n", within.stderr
    assert "MemoryError" in beyond.stderr


def test_a_file_for_reading_cannot_be_written(tmp_path: Path) -> None:
    """--read gives reading alone."""
    image = tmp_path / "image"
    image.write_text("content")

    done = run_confined(
        f"print(open({str(image)!r}).read()); open({str(image)!r}, 'r+')", "--read", image
    )

    assert "content" in done.stdout
    assert "PermissionError" in done.stderr
    assert image.read_text() == "content"


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.socket(socket.AF_INET)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "import ctypes, os; n = ctypes.CDLL(None, use_errno=True).syscall(425, 1, None); "
        "n < 0 and (_ for _ in ()).throw(OSError(ctypes.get_errno(), 'io_uring'))",
        "import ctypes, os; n = ctypes.CDLL(None, use_errno=True).unshare(0x10000000); "
        "n < 0 and (_ for _ in ()).throw(OSError(ctypes.get_errno(), 'unshare'))",
    ],
)
def test_no_new_way_out_can_be_made(attempt: str) -> None:
    """Sockets of every family, io_uring and namespaces are refused: what a program has, it was given."""
    done = run_confined(f"{attempt}\nprint('GOT OUT')")

    assert "GOT OUT" not in done.stdout
    assert "Errno 1]" in done.stderr


@pytest.mark.parametrize(
    "attempt",
    [
        "os.chmod({path!r}, 0o666)",
        "os.chmod(os.open({path!r}, os.O_RDONLY), 0o666)",
        "os.chown({path!r}, -1, os.getgid())",
        "os.utime({path!r}, (1, 1))",
        "os.setxattr({path!r}, b'user.mark', b'1')",
        "ctypes.CDLL(None).syscall(452, -100, {path!r}.encode(), 0o666, 0) == 0 or refused()",
        "libc = ctypes.CDLL(None); "
        "libc.inotify_add_watch(libc.inotify_init(), {path!r}.encode(), 0xFFF) >= 0 or refused()",
    ],
)
def test_no_attribute_of_the_owners_files_can_be_changed(attempt: str, tmp_path: Path) -> None:
    """Landlock leaves modes, times and extended attributes to the owner, who runs the program: the filter does not."""
    key = tmp_path / "id_ed25519"
    key.write_text("PRIVATE KEY")
    key.chmod(0o600)
    before = key.stat()
    helpers = "import ctypes, os\ndef refused(): raise PermissionError(1, 'refused')\n"

    done = run_confined(f"{helpers}{attempt.format(path=str(key))}\nprint('DONE')", "--read", key)

    assert "DONE" not in done.stdout
    assert "PermissionError" in done.stderr
    assert key.stat() == before
    assert os.listxattr(key) == []


def test_root_keeps_no_power(tmp_path: Path) -> None:
    """Capabilities are gone, and execve does not bring them back."""
    done = run_confined("print(open('/proc/self/status').read())", "--read", "/proc")

    lines = dict(line.split(":\t") for line in done.stdout.splitlines() if line.startswith("Cap"))
    assert lines["CapEff"] == lines["CapPrm"] == "0" * 16
    assert "NoNewPrivs:\t1" in done.stdout


def test_a_copy_on_write_file_is_never_open_for_writing(tmp_path: Path) -> None:
    """A program that opens it for reading and writing, as QEMU does, gets it for reading."""
    memory = tmp_path / "ram"
    memory.write_bytes(b"template")
    code = (
        f"import os, mmap; fd = os.open({str(memory)!r}, os.O_RDWR)\n"
        "private = mmap.mmap(fd, 8, flags=mmap.MAP_PRIVATE)\n"
        "private[:8] = b'modified'; print('private', private[:8])\n"
        "for attempt in (lambda: os.write(fd, b'x'), lambda: mmap.mmap(fd, 8, flags=mmap.MAP_SHARED),\n"
        f"    lambda: os.open({str(memory)!r}, os.O_WRONLY), lambda: os.truncate({str(memory)!r}, 0)):\n"
        "    try: attempt(); print('WROTE')\n"
        "    except OSError: pass\n"
    )

    done = run_confined(code, "--copy-on-write", memory)

    assert "private b'modified'" in done.stdout, done.stderr
    assert "WROTE" not in done.stdout
    assert memory.read_bytes() == b"template"


def test_the_program_ends_when_its_owner_lets_go_of_the_lifeline() -> None:
    """Closing the pipe, as the kernel does for a killed owner, ends the program at once."""
    read, write = os.pipe()
    command = [str(confine_binary()), "--lifeline", str(read)]
    for path in ("/usr", "/lib", "/lib64", "/bin"):
        command += ["--execute", path]
    process = subprocess.Popen([*command, "--", "/bin/sleep", "600"], pass_fds=(read,))
    os.close(read)
    time.sleep(0.2)
    running_before = process.poll() is None

    os.close(write)

    assert process.wait(timeout=PATIENCE_S) == 128 + 9
    assert running_before


def test_the_exit_status_passes_through() -> None:
    """The supervisor exits as its program did."""
    assert run_confined("raise SystemExit(7)").returncode == 7


def test_the_report_says_what_holds() -> None:
    """--report tells which walls this host's kernel could build."""
    read, write = os.pipe()

    run_confined("pass", "--report", str(write), pass_fds=(write,))
    os.close(write)
    with open(read) as stream:
        report = json.load(stream)

    assert report["landlock"] >= 1
    assert isinstance(report["namespaces"], bool)
