"""Real programs in a real guest, working on a mounted directory of the host: none can tell it from a local disk.

Each leaves its result on the host, which is looked at with the host's own programs. All share one guest.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm import HostDir, Memory, Shadow
from taskvm.sync import Sandbox

pytestmark = pytest.mark.vm

GUEST = {"cpus": 1, "memory_mib": 512}  # npm takes 200 MiB
RUN_TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that all these tests mount."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with dependencies of the host's own."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def vm(programs_image: str, shared: Path, project: Path) -> Iterator[Sandbox]:
    """A guest with compilers and package managers, `shared` at /workspace, and `project` with private places."""
    private = Shadow(
        HostDir(project), ["node_modules/", ".venv/", ".env"], private=Memory(limit_bytes=1 << 28)
    )
    mounts = {"/workspace": HostDir(shared), "/project": private}
    with Sandbox.create(image=programs_image, mounts=mounts, **GUEST) as sandbox:
        yield sandbox


@pytest.fixture
def here(shared: Path, request: pytest.FixtureRequest) -> Path:
    """A directory of this test's own, as the host names it."""
    path = shared / request.node.name
    path.mkdir()
    return path


@pytest.fixture
def done(vm: Sandbox, here: Path) -> Callable[[str], str]:
    """Runs a shell script there in the guest, which must succeed; returns what it printed."""

    def run(script: str) -> str:
        command = ["bash", "-euo", "pipefail", "-c", script]
        result = vm.exec(command, cwd=f"/workspace/{here.name}", timeout_s=RUN_TIMEOUT_S)
        assert result.exit_code == 0, result.stdout + result.stderr
        return result.stdout

    return run


def host(*command: str | Path, cwd: Path) -> str:
    """Run a program of the host with no settings of this machine's user."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "GIT_CONFIG_GLOBAL": "/dev/null"}
    environment |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory"}
    environment |= {"GIT_CONFIG_VALUE_0": "*"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    ).stdout


# What programs ask of a file system and would notice; sizes and links of directories are each file system's own.
BATTERY = """
import ctypes, errno, fcntl, mmap, os, select, socket, stat, sys

def told(call, *arguments, **keywords):
    try:
        value = call(*arguments, **keywords)
    except OSError as error:
        return errno.errorcode[error.errno]
    if isinstance(value, os.stat_result):
        kind = stat.S_IFMT(value.st_mode)
        sizes = () if kind == stat.S_IFDIR else (value.st_size, value.st_nlink)
        return oct(value.st_mode), value.st_uid, value.st_gid, *sizes
    return value

def say(what, *values):
    print(what, *values)

def put(name, data=b"", flags=0, mode=0o666):
    fd = os.open(name, os.O_CREAT | os.O_RDWR | flags, mode)
    os.write(fd, data)
    return fd

os.umask(0o027)
fd = put("file", b"0123456789", mode=0o777)
say("created", told(os.stat, "file"), os.fstat(fd).st_ino == os.stat("file").st_ino)
say("pread", os.pread(fd, 4, 3), os.pread(fd, 4, 100))
say("excl", told(put, "file", flags=os.O_EXCL), told(os.mkdir, "file"), told(os.symlink, "x", "file"))
say("dirs", told(os.mkdir, "d"), told(os.mkdir, "d"), told(os.rmdir, "file"), told(os.unlink, "d"))
say("in a file", told(os.stat, "file/x"), told(os.mkdir, "file/x"), told(os.open, "d", os.O_WRONLY))
say("modes", told(os.chmod, "file", 0o4750), told(os.chmod, "file", 0o640), told(os.stat, "file"))
say("utime", told(os.utime, "file", ns=(123, 1_700_000_000_123_456_789)), os.stat("file").st_mtime_ns)
say("links", told(os.link, "file", "link"), told(os.stat, "link"), told(os.link, "d", "dl"))
say("symlinks", told(os.symlink, "d/../file", "s"), told(os.readlink, "s"), told(os.lstat, "s"), told(os.stat, "s"))
say("loops", told(os.symlink, "loop", "loop"), told(os.stat, "loop"), told(os.readlink, "file"))
say("long", told(os.stat, "x" * 256), told(os.symlink, "y" * 4095, "long"), len(os.readlink("long")))
say("holes", told(os.ftruncate, fd, 1 << 20), os.lseek(fd, 0, os.SEEK_END), told(os.stat, "file"), os.pread(fd, 3, 9))
say("append", os.write(os.open("file", os.O_WRONLY | os.O_APPEND), b"end"), told(os.stat, "link"))
say("trunc", os.close(os.open("file", os.O_WRONLY | os.O_TRUNC)), told(os.stat, "file"))
os.pwrite(fd, b"mapped", 0)
with mmap.mmap(fd, 6) as view:
    view[:3] = b"MAP"
    view.flush()
say("mmap", os.pread(fd, 10, 0))
os.unlink("file")
say("unlinked", told(os.stat, "file"), told(os.fstat, fd), told(os.stat, "link"))
os.unlink("link")
say("orphan", os.fstat(fd).st_nlink, os.pwrite(fd, b"still", 0), os.pread(fd, 5, 0))
say("rename", told(os.rename, "d", "e"), told(os.rename, "missing", "x"), told(os.stat, "e"))
os.close(put("e/a", b"a")); os.close(put("b", b"b"))
say("replace", told(os.rename, "b", "e/a"), open("e/a").read(), told(os.rename, "e", "e/e"), told(os.rmdir, "e"))
os.mkdir("empty"); os.mkdir("full"); os.close(put("full/x"))
say("over", told(os.rename, "empty", "full"), told(os.rename, "full", "empty"), told(os.rename, "e/a", "empty"))
libc = ctypes.CDLL(None)
for flags in (1, 2, 3, 4 | 64):
    say("renameat2", flags, libc.renameat2(-100, b"empty", -100, b"e", flags), sorted(os.listdir("empty")))
say("lock", told(fcntl.flock, fd, fcntl.LOCK_EX), told(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1))
say("fallocate", told(os.posix_fallocate, fd, 0, 8192), os.fstat(fd).st_size)
say("fsync", told(os.fsync, fd), told(os.fdatasync, fd), told(os.fsync, os.open(".", os.O_RDONLY)))
say("copy", told(os.copy_file_range, fd, put("copied"), 5), open("copied").read())
say("xattr", told(os.setxattr, "copied", "user.k", b"v"), told(os.getxattr, "copied", "user.k"))
say("xattrs", told(os.listxattr, "copied"))
say("no xattr", told(os.getxattr, "copied", "user.none"), told(os.removexattr, "copied", "user.none"))
say("fifo", told(os.mkfifo, "fifo", 0o600), told(os.stat, "fifo"), told(os.open, "fifo", os.O_WRONLY | os.O_NONBLOCK))
with socket.socket(socket.AF_UNIX) as listener:
    say("socket", listener.bind("sock"), listener.listen(), socket.socket(socket.AF_UNIX).connect("sock"))
for number in range(300):
    os.close(put(f"many{number:03}"))
with os.scandir(".") as entries:
    for entry in entries:
        if entry.name.startswith("many"):
            os.unlink(entry)
say("left", sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in os.scandir(".")))
say("bytes", told(os.mkdir, b"\\xff\\xfe"), os.listdir(b".").count(b"\\xff\\xfe"), told(os.mkdir, "\\n"))
os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
say("gone", told(os.getcwd), told(os.listdir, "."), told(put, "x"), told(os.stat, ".")[:3])
"""


def test_a_program_cannot_tell_the_mount_from_the_disk(
    here: Path, done: Callable[[str], str]
) -> None:
    """The same calls on the guest's own ext4 have the same results, errors included."""
    (here / "battery.py").write_text(BATTERY)

    mounted = done("mkdir mounted && cd mounted && python3 ../battery.py")
    local = done(
        "mkdir -p /var/tmp/local && script=$PWD/battery.py && cd /var/tmp/local && python3 $script"
    )

    assert mounted.splitlines() == local.splitlines()
    assert len(mounted.splitlines()) > 35


def test_git_clones_commits_rebases_and_repacks(here: Path, done: Callable[[str], str]) -> None:
    """The history is the same for the host's git, which finds nothing wrong with it."""
    done("""
        export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@localhost GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@localhost
        git init -q --bare origin.git
        git clone -q origin.git work 2>/dev/null && cd work && git checkout -q -b main
        for n in $(seq 8); do mkdir -p d$n; seq $((n * 100)) > d$n/file; git add .; git commit -qm "change $n"; done
        git push -q origin main
        git checkout -q -b topic HEAD~3 && echo topic > topic && git add . && git commit -qm topic
        git rebase -q main && git merge-base --is-ancestor main topic
        git worktree add -q ../tree main && (cd ../tree && echo tree > tree && git add . && git commit -qm tree)
        git stash -q 2>/dev/null; git tag -m v1 v1
        git gc -q --aggressive && git fsck --strict && git repack -qad
        git clone -q --local . ../cloned && diff -r d1 ../cloned/d1
        git status --porcelain | wc -l
    """)

    assert host("git", "fsck", "--strict", cwd=here / "work") == ""
    assert host("git", "status", "--porcelain", cwd=here / "work") == ""
    log = host("git", "log", "--format=%s", "topic", "--", cwd=here / "work").splitlines()
    assert log == ["topic", *(f"change {n}" for n in range(8, 0, -1))]
    assert (here / "tree" / "tree").read_text() == "tree\n"


def wheel(path: Path, modules: int) -> None:
    """Write a wheel of a package `many` with so many modules and a command."""
    files = {f"many/m{number}.py": f"VALUE = {number}\n".encode() for number in range(modules)}
    files["many/__init__.py"] = b"def main(): print('installed')\n"
    files["many-1.0.dist-info/METADATA"] = b"Metadata-Version: 2.1\nName: many\nVersion: 1.0\n"
    files["many-1.0.dist-info/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files["many-1.0.dist-info/entry_points.txt"] = b"[console_scripts]\nmany = many:main\n"
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    files["many-1.0.dist-info/RECORD"] = f"{record}many-1.0.dist-info/RECORD,,\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def test_pip_installs_and_uninstalls(here: Path, done: Callable[[str], str]) -> None:
    """From a wheel in the mount into the mount, with bytecode and a command; python's caches are used again."""
    wheel(here / "many-1.0-py3-none-any.whl", modules=120)

    said = done("""
        export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 PIP_ROOT_USER_ACTION=ignore PYTHONUSERBASE=$PWD/base
        pip install -q --user --break-system-packages --find-links . many
        base/bin/many; python3 -c 'import many.m7; print(many.m7.VALUE, many.m7.__cached__)'
        pip uninstall -q -y --break-system-packages many; find base -type f | wc -l
    """)

    lines = said.splitlines()
    assert lines[0] == "installed"
    assert lines[1].startswith("7 /workspace/")
    assert lines[2] == "0"


def package(path: Path, name: str, files: dict[str, str]) -> None:
    """Write an npm package as `npm pack` does."""
    with tarfile.open(path, "w:gz") as archive:
        for inner, text in files.items():
            entry = tarfile.TarInfo(f"package/{inner}")
            entry.size, entry.mode = len(text), 0o755 if inner.startswith("bin/") else 0o644
            archive.addfile(entry, io.BytesIO(text.encode()))


def test_npm_installs_and_its_commands_run(here: Path, done: Callable[[str], str]) -> None:
    """From packages in the mount, with a dependency between them and a command."""
    helper = {f"lib/f{n}.js": f"module.exports = {n};\n" for n in range(150)}
    helper["package.json"] = json.dumps({"name": "helper", "version": "1.0.0"})
    package(here / "helper.tgz", "helper", helper)
    tool = {"name": "tool", "version": "1.0.0", "bin": {"tool": "bin/tool.js"}}
    script = "#!/usr/bin/env node\nconsole.log('f' + require('helper/lib/f42.js'));\n"
    package(here / "tool.tgz", "tool", {"package.json": json.dumps(tool), "bin/tool.js": script})
    (here / "package.json").write_text('{"name": "app", "version": "1.0.0", "private": true}')

    said = done("""
        export npm_config_offline=true npm_config_audit=false npm_config_fund=false npm_config_update_notifier=false
        export npm_config_cache=/var/tmp/npm
        npm install --silent ./helper.tgz ./tool.tgz
        node_modules/.bin/tool; find node_modules/helper -type f | wc -l
        rm -rf node_modules
    """)

    assert said.splitlines() == ["f42", "151"]
    assert not (here / "node_modules").exists()
    assert (
        "helper"
        in json.loads((here / "package-lock.json").read_text())["packages"][""]["dependencies"]
    )


def test_npm_and_venv_work_in_private_directories_of_a_project(vm: Sandbox, project: Path) -> None:
    """The host's own are neither used nor changed; the lock file, and what git sees, is shared."""
    tool = {"name": "tool", "version": "1.0.0", "bin": {"tool": "bin/tool.js"}}
    script = "#!/usr/bin/env node\nconsole.log('of the guest');\n"
    package(project / "tool.tgz", "tool", {"package.json": json.dumps(tool), "bin/tool.js": script})
    (project / "package.json").write_text('{"name": "app", "version": "1.0.0", "private": true}')
    for path in ("node_modules/tool/index.js", ".venv/bin/python", ".env"):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text("of the host")

    done = vm.exec(
        """
        set -eu; git init -q; printf 'node_modules\n.venv\n.env\n' > .gitignore
        export npm_config_offline=true npm_config_audit=false npm_config_fund=false npm_config_update_notifier=false
        npm_config_cache=/var/tmp/npm npm install --silent ./tool.tgz
        node_modules/.bin/tool; ls -A
        python3 -m venv --without-pip .venv; .venv/bin/python -c 'import sys; print(sys.prefix)'
        echo PORT=1 > .env; mv .env .env.bak; mv .env.bak .env; cat .env; git status --porcelain
        mkdir -p packages; mv node_modules packages/; ls packages; rm -rf packages .venv
        """,
        cwd="/project",
        timeout_s=RUN_TIMEOUT_S,
    )

    assert done.stderr == ""
    assert done.stdout.split("\n")[0] == "of the guest"
    assert "/project/.venv\nPORT=1\n" in done.stdout
    shared = {".git", ".gitignore", "package.json", "package-lock.json", "tool.tgz"}
    assert {path.name for path in project.iterdir()} == shared | {"node_modules", ".venv", ".env"}
    for path in ("node_modules/tool/index.js", ".venv/bin/python", ".env"):
        assert (project / path).read_text() == "of the host"


def test_sqlite_with_a_write_ahead_log_serves_several_programs(
    here: Path, done: Callable[[str], str]
) -> None:
    """Four writers at once through shared memory in a mapped file; the host reads what they wrote."""
    said = done("""
        sqlite3 data.db 'PRAGMA journal_mode=WAL; CREATE TABLE t (writer, n)'
        writes() { for n in $(seq 25); do echo "INSERT INTO t VALUES ($1, $n);"; done; }
        for w in 1 2 3 4; do writes $w | sqlite3 -cmd '.timeout 250000' data.db & done; wait
        sqlite3 data.db 'PRAGMA integrity_check; SELECT count(*), count(DISTINCT writer) FROM t'
        sqlite3 data.db 'PRAGMA wal_checkpoint(TRUNCATE)'
    """)

    assert said.split() == ["wal", "ok", "100|4", "0|0|0"]
    with sqlite3.connect(f"file:{here}/data.db?mode=ro", uri=True) as database:
        assert database.execute("SELECT sum(n) FROM t").fetchone() == (1300,)
    database.close()


def test_make_builds_a_c_program_and_only_what_changed(
    here: Path, done: Callable[[str], str], tmp_path: Path
) -> None:
    """make trusts the times that the mount tells: a second run does nothing, a touched source is compiled again."""
    (here / "Makefile").write_text(
        "app: main.o half.o\n\t$(CC) -o $@ $^\n%.o: %.c half.h\n\t$(CC) -c -o $@ $<\n"
    )
    (here / "half.h").write_text("int half(int);\n")
    (here / "half.c").write_text('#include "half.h"\nint half(int n) { return n / 2; }\n')
    (here / "main.c").write_text(
        '#include <stdio.h>\n#include "half.h"\nint main(void) { printf("%d\\n", half(42)); }\n'
    )

    first = done("make -j2 && ./app")
    second = done("make")
    third = done("sleep 0.01; touch half.c && make")

    assert first.splitlines()[-1] == "21"
    assert "is up to date" in second
    assert ("half.c" in third, "main.c" in third) == (True, False)
    shutil.copy(here / "app", tmp_path / "app")
    assert subprocess.check_output([tmp_path / "app"]) == b"21\n"


def test_rsync_and_tar_keep_everything(here: Path, done: Callable[[str], str]) -> None:
    """Links of both kinds, times to the nanosecond, modes and holes; a second rsync finds nothing to do."""
    done("""
        mkdir -p from/deep/er && cd from && echo data > file && ln file deep/linked && ln -s ../file deep/er/pointer
        ln -s /nonexistent dangling; truncate -s 3M hole && printf end >> hole && chmod 750 deep && chmod 600 file
        mkfifo fifo && touch -d '2001-02-03 04:05:06.123456789' file deep/er fifo && printf 'x' > $'new\\nline'
        find . -depth -exec touch -h -d '2001-02-03 04:05:06.123456789' {} +  # to rsync one second is one time
    """)
    said = done("""
        rsync -aHS from/ to/ && rsync -aHS --itemize-changes from/ to/ && echo nothing to do
        tar -C from --format=posix -cSf all.tar . && mkdir unpacked && tar -C unpacked -xpf all.tar
        for d in from to unpacked; do
            (cd $d && find . -type d -printf '%p %m %T@\\n' -o -printf '%p %y %m %s %n %T@ %l\\n' | sort > ../$d.list)
        done
    """)

    assert said == "nothing to do\n"
    lists = [
        (here / f"{name}.list").read_text().splitlines() for name in ("from", "to", "unpacked")
    ]
    assert lists[0] == lists[1] == lists[2]
    assert len(lists[0]) == 11  # one of the ten names has two lines
    assert (here / "to" / "file").stat().st_ino == (here / "to" / "deep" / "linked").stat().st_ino
    assert (here / "to" / "hole").stat().st_blocks < 3 << 20 >> 9


def test_pytest_and_ripgrep_work_on_a_project(here: Path, done: Callable[[str], str]) -> None:
    for number in range(20):
        (here / f"test_{number}.py").write_text(
            f"def test_it(tmp_path): assert {number} >= 0  # needle\n"
        )
    (here / ".gitignore").write_text("ignored\n")
    (here / "ignored").write_text("needle\n")
    (here / ".git").mkdir()

    said = done("""
        python3 -m pytest -q | tail -1; python3 -m pytest -q --lf | tail -1; rg -c needle . | wc -l
    """)

    assert said.count("20 passed") == 2
    assert said.splitlines()[-1] == "20"
    assert (here / ".pytest_cache").is_dir()


def test_editors_save_by_rename(here: Path, done: Callable[[str], str]) -> None:
    """A new file, synced, moved over the old one, which becomes the backup; readers see the old one or the new one."""
    (here / "file").write_text("old\n")
    (here / "file").chmod(0o664)

    done("""
        cp -p file .file.swp && printf 'new\\n' > .file.swp && sync .file.swp && ln file file~ && mv .file.swp file
        sed -i.bak 's/new/newer/' file
        (while :; do cat file; done > seen) & reader=$!
        for n in $(seq 50); do printf '%05d\\n' $n > .tmp && mv .tmp file; done
        kill $reader; wait $reader || true
        ! grep -vE '^(newer|[0-9]{5})$' seen
    """)

    assert (here / "file").read_text() == "00050\n"
    assert ((here / "file~").read_text(), (here / "file.bak").read_text()) == ("old\n", "new\n")
    assert (here / "file.bak").stat().st_mode & 0o777 == 0o664
