"""A directory in the mode "review": what the guest does stays in the guest until it is applied (taskvm.review.survey,
taskvm.review.changes, taskvm.review.mounted, taskvm.fs.lower, taskvm.fs.hostpaths). Judged by the host's own files.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S, wait_until

from taskvm import (
    ChangeSet,
    CopyError,
    CopyLimits,
    GuestError,
    HostDir,
    Sandbox,
    Shadow,
    UsageError,
)
from taskvm.vm.rundir import run_base, sweep

pytestmark = pytest.mark.vm


def fill(root: Path) -> None:
    """What a small project has: a program, a note, a deep directory, a link and an empty directory."""
    (root / "src" / "deep").mkdir(parents=True)
    (root / "src" / "run.sh").write_text("#!/bin/sh\necho one\necho two\n")
    (root / "src" / "run.sh").chmod(0o755)
    (root / "src" / "deep" / "data").write_bytes(bytes(range(256)))
    (root / "note").write_text("first\nsecond\nthird\n")
    (root / "link").symlink_to("note")
    (root / "empty").mkdir()


def described(root: Path) -> dict[str, tuple[object, ...]]:
    """Each path below `root`: kind, permissions, content or target."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            found[str(path.relative_to(root))] = ("link", str(path.readlink()))
        elif path.is_dir():
            found[str(path.relative_to(root))] = ("dir", mode)
        else:
            found[str(path.relative_to(root))] = ("file", mode, path.read_bytes())
    return found


def kinds(changes: ChangeSet) -> dict[str, str]:
    return {change.path: change.kind for change in changes}


@pytest.fixture
async def vm(workspace: Path) -> AsyncIterator[Sandbox]:
    """A sandbox that reviews `workspace`, which has something in it, at /workspace."""
    fill(workspace)
    mounts = {"/workspace": HostDir(workspace, mode="review")}
    async with Sandbox.create(mounts=mounts, **GUEST) as sandbox:
        yield sandbox


KILLED = """
import asyncio, os, signal, sys
from taskvm import HostDir, Sandbox

async def main():
    mounts = {"/workspace": HostDir(sys.argv[1], mode="review")}
    vm = await Sandbox.create(cpus=1, memory_mib=256, mounts=mounts)
    await vm.exec("echo secret > made", check=True)
    changes = await vm.changes()
    copies = changes._items["made"].content.parent
    print(copies, *sorted(os.listdir(copies)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_a_killed_program_leaves_no_copies_behind(workspace: Path) -> None:
    """Whoever starts next removes them with its sandbox."""
    command = [sys.executable, "-c", KILLED, workspace]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S)
    copies, *held = done.stdout.split()
    sweep(run_base())

    assert (done.returncode, held) == (-signal.SIGKILL, ["1", "lock"])
    wait_until(lambda: not Path(copies).exists())  # another's start may be about to remove them


async def run(vm: Sandbox, script: str) -> str:
    return (await vm.exec(script, check=True)).stdout


# Looking.


async def test_the_guest_changes_its_view_and_the_host_keeps_its_files(
    vm: Sandbox, workspace: Path
) -> None:
    before = described(workspace)

    seen = await run(
        vm,
        "echo new > fresh; echo more >> note; rm -r src; cat note fresh; ls; id -u; stat -c %u .",
    )

    assert seen.split() == [
        "first",
        "second",
        "third",
        "more",
        "new",
        "empty",
        "fresh",
        "link",
        "note",
        "0",
        "0",
    ]
    assert described(workspace) == before


async def test_every_kind_of_change_is_named(vm: Sandbox) -> None:
    """Added, modified, deleted, type, mode; what was only touched or rewritten alike is no change."""
    await run(
        vm,
        "mkdir new; echo x > new/file; ln -s file new/link; echo four >> note; chmod 700 empty; rm src/run.sh; "
        "rm link; mkdir link; echo in > link/in; cp src/deep/data /tmp/d; cat /tmp/d > src/deep/data",
    )

    with await vm.changes() as changes:
        assert kinds(changes) == {
            "empty": "mode",
            "link": "type",
            "link/in": "added",
            "new": "added",
            "new/file": "added",
            "new/link": "added",
            "note": "modified",
            "src/run.sh": "deleted",
        }


async def test_a_renamed_directory_is_its_files_added_and_deleted(vm: Sandbox) -> None:
    await run(vm, "mv src lib; echo three >> lib/run.sh")

    with await vm.changes() as changes:
        assert kinds(changes) == {
            "lib": "added",
            "lib/deep": "added",
            "lib/deep/data": "added",
            "lib/run.sh": "added",
            "src": "deleted",
            "src/deep": "deleted",
            "src/deep/data": "deleted",
            "src/run.sh": "deleted",
        }
        assert changes.read("lib/run.sh").endswith(b"two\nthree\n")
        assert changes.read("lib/deep/data") == bytes(range(256))


async def test_a_directory_made_anew_hides_what_was_in_it(vm: Sandbox) -> None:
    await run(vm, "rm -r src; mkdir src; echo only > src/only")

    with await vm.changes() as changes:
        assert kinds(changes) == {
            "src/deep": "deleted",
            "src/deep/data": "deleted",
            "src/only": "added",
            "src/run.sh": "deleted",
        }


# Applying.


async def test_applied_changes_make_the_host_like_the_guest(vm: Sandbox, workspace: Path) -> None:
    """Whatever was done; and then nothing is left to apply."""
    await run(
        vm,
        "mv src lib; echo three >> lib/run.sh; chmod 600 note; rm -r empty; echo file > empty; rm link; mkdir link; "
        "echo in > link/in; ln -s ../note link/up; mkdir -p a/b/c; printf 'no newline' > a/b/c/text; : > void",
    )
    await vm.files.copy_out("/workspace", workspace.parent / "copy")

    with await vm.changes() as changes:
        outcomes = changes.apply()

    assert {outcome.status for outcome in outcomes} == {"applied"}
    assert described(workspace) == described(workspace.parent / "copy")
    with await vm.changes() as changes:
        assert kinds(changes) == {}


async def test_what_is_applied_is_what_was_looked_at(vm: Sandbox, workspace: Path) -> None:
    """The guest rewrites a file after the set was taken, and is gone when it is applied."""
    await run(vm, "echo shown > note")
    changes = await vm.changes()
    await run(vm, "echo hidden > note; echo more > other")
    await vm.close()

    with changes:
        changes.apply()

    assert (workspace / "note").read_text() == "shown\n"
    assert not (workspace / "other").exists()


async def test_chosen_paths_are_applied_with_the_directories_they_need(
    vm: Sandbox, workspace: Path
) -> None:
    await run(vm, "mkdir -p a/b; echo 1 > a/b/one; echo 2 > a/two; echo no > note")

    with await vm.changes() as changes:
        outcomes = changes.apply(["a/b/one"])
        with pytest.raises(UsageError, match="the set has none there"):
            changes.apply(["src"])

    assert [outcome.path for outcome in outcomes] == ["a", "a/b", "a/b/one"]
    assert (workspace / "a" / "b" / "one").read_text() == "1\n"
    assert not (workspace / "a" / "two").exists()
    assert (workspace / "note").read_text() == "first\nsecond\nthird\n"


async def test_what_the_host_changed_too_stays_unless_forced(vm: Sandbox, workspace: Path) -> None:
    """Edited, deleted and created on the host since the sandbox began: each is a conflict, and no file is lost."""
    await run(
        vm,
        "cat note; echo guest >> note; echo guest >> src/run.sh; echo guest > fresh; rm -r empty",
    )
    (workspace / "note").write_text("host\n")
    (workspace / "src" / "run.sh").unlink()
    (workspace / "fresh").write_text("host\n")
    (workspace / "empty" / "late").write_text("host\n")

    with await vm.changes() as changes:
        outcomes = {outcome.path: outcome for outcome in changes.apply()}
        kept = described(workspace)
        forced = {outcome.path: outcome.status for outcome in changes.apply(force=True)}

    assert {path: outcome.status for path, outcome in outcomes.items()} == {
        "empty": "failed",
        "empty/late": "conflict",
        "fresh": "conflict",
        "note": "conflict",
        "src/run.sh": "conflict",
    }
    assert "deleted it" in outcomes["src/run.sh"].reason
    assert kept["note"][2] == kept["fresh"][2] == kept["empty/late"][2] == b"host\n"
    assert "src/run.sh" not in kept
    assert set(forced.values()) == {"applied"}
    assert (workspace / "note").read_text() == "first\nsecond\nthird\nguest\n"


async def test_a_save_of_the_host_while_a_set_is_open_is_never_overwritten(
    vm: Sandbox, workspace: Path
) -> None:
    await run(vm, "echo guest >> note; rm src/run.sh")

    with await vm.changes() as changes:
        (workspace / "note").write_text("host\n")
        (workspace / "src" / "run.sh").write_text("host\n")
        outcomes = changes.apply(force=True)

    assert {outcome.status for outcome in outcomes} == {"conflict"}
    assert (
        (workspace / "note").read_text() == (workspace / "src" / "run.sh").read_text() == "host\n"
    )


async def test_a_second_round_of_changes_is_no_conflict_with_the_first(
    vm: Sandbox, workspace: Path
) -> None:
    await run(vm, "echo one > note")
    with await vm.changes() as changes:
        changes.apply()
    await run(vm, "echo two > note")

    with await vm.changes() as changes:
        outcomes = changes.apply()

    assert [outcome.status for outcome in outcomes] == ["applied"]
    assert (workspace / "note").read_text() == "two\n"


# Discarding.


async def test_discarded_changes_are_gone_and_the_hosts_files_are_seen(
    vm: Sandbox, workspace: Path
) -> None:
    await run(vm, "echo guest > note; rm -r src; ls absent || true")
    (workspace / "note").write_text("edited on the host\n")
    (workspace / "absent").write_text("made on the host\n")

    await vm.discard()

    assert (await run(vm, "cat note absent; ls src")).splitlines() == [
        "edited on the host",
        "made on the host",
        "deep",
        "run.sh",
    ]
    with await vm.changes() as changes:
        assert len(changes) == 0


async def test_changes_in_use_are_not_discarded(vm: Sandbox) -> None:
    """A program that sits there keeps its files: the answer is EBUSY, and the view is whole."""
    process = await vm.spawn("echo kept > kept; echo ready; exec sleep 600")
    await anext(aiter(process.stdout))

    with pytest.raises(GuestError) as caught:
        await vm.discard()

    assert caught.value.errno == 16
    assert await run(vm, "cat kept") == "kept\n"
    await process.kill_all()


# What the host does meanwhile.


async def test_files_that_the_host_saves_are_seen_or_stay_readable(
    vm: Sandbox, workspace: Path
) -> None:
    """An editor's save is a rename over the file: the guest goes on reading, and soon reads the new content."""
    await run(vm, "cat note src/run.sh")
    (workspace / "note~").write_text("saved on the host\n")
    (workspace / "note~").rename(workspace / "note")
    with (workspace / "src" / "run.sh").open("a") as file:
        file.write("appended\n")

    seen = await run(
        vm,
        "until grep -q saved note && grep -q appended src/run.sh; do sleep 0.1; done; cat note; tail -n1 src/run.sh",
    )

    assert seen == "saved on the host\nappended\n"


async def test_what_the_guest_changed_outlives_what_the_host_removes(
    vm: Sandbox, workspace: Path
) -> None:
    """Its own version of a file, and a renamed directory, stay whole when the host's are gone, or come back."""
    await run(vm, "echo guest >> note; echo guest > src/own; cat src/run.sh link")
    (workspace / "note").unlink()
    shutil.rmtree(workspace / "src")
    seen = await run(
        vm,
        'until [ "$(ls src)" = own ]; do sleep 0.1; done; tail -n1 note; cat src/own; ls src; ls',
    )
    (workspace / "src").mkdir()
    (workspace / "src" / "run.sh").write_text("back\n")

    back = await run(
        vm,
        "until test -e src/run.sh; do sleep 0.1; done; cat src/run.sh src/own; "
        "echo more >> src/run.sh; tail -n1 src/run.sh",
    )

    assert seen.split() == ["guest", "guest", "own", "empty", "link", "note", "src"]
    assert back.splitlines() == ["back", "guest", "more"]


async def test_what_is_hidden_from_the_guest_is_neither_changed_nor_shown(workspace: Path) -> None:
    """Removed with its directory, or written at its name: the host's file stays, and no diff has it."""
    fill(workspace)
    for path in (workspace / ".env", workspace / "src" / ".env"):
        path.write_text("TOKEN=hidden\n")
    mounts = {"/workspace": Shadow(HostDir(workspace, mode="review"), [".env"])}
    async with Sandbox.create(mounts=mounts, **GUEST) as vm:
        await run(vm, "test ! -e .env; echo TOKEN=guest > .env; rm -r src")

        with await vm.changes() as changes:
            diff = changes.diff()
            outcomes = {outcome.path: outcome.status for outcome in changes.apply(force=True)}

    assert "hidden" not in diff
    assert outcomes[".env"] == "refused"
    assert outcomes["src"] == "failed"
    assert sorted(path.name for path in (workspace / "src").iterdir()) == [".env"]
    assert (workspace / ".env").read_text() == "TOKEN=hidden\n"


# Limits.


async def test_more_than_the_limits_is_refused_or_left_out(
    vm: Sandbox, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many files are an error, and too little room; too many bytes in a file are a refusal that names it."""
    await run(vm, "truncate -s 8E huge 2>/dev/null || truncate -s 1T huge; seq 50 | xargs touch")

    with pytest.raises(CopyError, match="more than 20"):
        await vm.changes(limits=CopyLimits(max_entries=20, max_bytes=1000))
    with monkeypatch.context() as patch:
        patch.setattr("taskvm.treecopy.LOOK_BYTES", 1)
        patch.setattr("taskvm.treecopy.spare_bytes", lambda directory: 1 << 60)
        await run(vm, "echo text > small")
        with pytest.raises(CopyError, match="must remain for sandboxes"):
            await vm.changes()
    await run(vm, "rm small")
    with await vm.changes() as changes:
        (refused,) = [outcome for outcome in changes.apply() if outcome.status != "applied"]

    assert (refused.path, refused.status) == ("huge", "refused")
    assert not (workspace / "huge").exists()
    assert (workspace / "50").exists()


async def test_only_a_mount_for_review_has_changes(vm: Sandbox) -> None:
    with pytest.raises(UsageError, match="no directory is mounted there for review"):
        await vm.changes("/home")
    with pytest.raises(UsageError, match=r"Name the place of one that is: /workspace$"):
        await vm.changes("/home")


async def test_git_in_the_guest_and_git_apply_on_the_host_agree(
    vm: Sandbox, workspace: Path
) -> None:
    """The patch makes a copy of the host's files what the guest's are: text, bytes, modes, links, odd names."""
    copy = workspace.parent / "copy"
    subprocess.run(["cp", "-a", workspace, copy], check=True)
    await run(
        vm,
        "sed -i 2d note; printf 'x\\0y' > src/deep/data; chmod -x src/run.sh; ln -sf src/run.sh link; rmdir empty; "
        "printf 'no newline' > 'sp ace'; printf '\\377' > $'odd\\n\\377\"name'; : > void; seq 3000 > many",
    )

    with await vm.changes() as changes:
        patch = changes.diff(binary=True)
        assert "Binary files" in changes.diff()
        changes.apply()
    git = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CEILING_DIRECTORIES": str(copy.parent),
    }
    subprocess.run(
        ["git", "apply", "-"],
        input=patch.encode("utf-8", "surrogateescape"),
        cwd=copy,
        env=git,
        check=True,
    )

    made = described(copy)
    made.pop("empty")  # git knows no directories
    assert made == described(workspace)


# Checkpoints.


async def test_a_checkpoint_holds_changes_and_trusts_none_of_the_hosts_files(
    vm: Sandbox, workspace: Path
) -> None:
    """A sandbox that starts from it goes on with them; what the host has may have been edited since: a conflict."""
    await run(vm, "echo guest >> note; echo new > fresh")
    saved = await vm.checkpoint(workspace.parent / "saved.qcow2")
    await vm.close()
    (workspace / "note").write_text("edited between the two\n")

    mounts = {"/workspace": HostDir(workspace, mode="review")}
    async with saved.resume(mounts=mounts) as again:
        seen = await run(again, "cat note fresh")
        with await again.changes() as changes:
            outcomes = {outcome.path: outcome.status for outcome in changes.apply()}
        await again.discard()
        await run(again, "echo later >> note")
        with await again.changes() as changes:
            later = {outcome.path: outcome.status for outcome in changes.apply()}

    assert seen == "first\nsecond\nthird\nguest\nnew\n"
    assert outcomes == {"note": "conflict", "fresh": "applied"}
    assert later == {"note": "applied"}
    assert (workspace / "note").read_text() == "edited between the two\nlater\n"
