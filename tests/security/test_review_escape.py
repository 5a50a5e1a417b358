"""A guest whose root prepares a change set against its reviewer. Judged by the host's directories and its memory.

It writes what it likes into the upper layer, where overlayfs itself would never have put it, and into the agent's
answers; the host's own trees beside the mounted one hold what it is after.
"""

import os
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.peak import Peak

from taskvm import CopyError, CopyLimits, HostDir, Sandbox, printable

pytestmark = pytest.mark.vm

UPPER = "U=$(echo /var/lib/taskvm/review/*/upper); cd /; "


@pytest.fixture
async def vm(workspace: Path) -> AsyncIterator[Sandbox]:
    """A sandbox that reviews `workspace`, beside which there is a secret."""
    (workspace / "src").mkdir()
    (workspace / "src" / "file").write_text("host\n")
    (workspace / "note").write_text("host\n")
    (workspace.parent / "secret").write_text("secret\n")
    async with Sandbox.create(
        mounts={"/workspace": HostDir(workspace, mode="review")}, **GUEST
    ) as sandbox:
        yield sandbox


async def as_root(vm: Sandbox, script: str) -> None:
    await vm.exec(UPPER + script, user="root", check=True)


def outside(workspace: Path) -> dict[str, str]:
    """What is beside the mounted directory."""
    return {
        path.name: path.read_text() if path.is_file() else "directory"
        for path in workspace.parent.iterdir()
    }


async def test_links_in_the_layer_lead_nowhere(vm: Sandbox, workspace: Path) -> None:
    """A directory of the host's that the guest makes a link, with files behind it: the host follows neither."""
    before = outside(workspace)
    await as_root(
        vm,
        'rm -rf "$U/src"; ln -s ../.. "$U/src"; ln -s ../secret "$U/note"; ln -s / "$U/root"; '
        'mkdir "$U/d"; ln -s ../../secret "$U/d/link"',
    )

    with await vm.changes() as changes:
        careful = {outcome.path: outcome.status for outcome in changes.apply()}
        diff = changes.diff()
        changes.apply(guarded=True, force=True)

    assert {careful[path] for path in ("src", "note", "root", "d/link")} == {"guarded"}
    assert "secret\n+" not in diff
    assert "+secret" not in diff
    assert outside(workspace) == before
    assert (workspace / "root").is_symlink()  # asked for in so many words: a link, and no more


async def test_a_link_swapped_in_on_the_host_is_not_followed(vm: Sandbox, workspace: Path) -> None:
    """A process of the host's, or another guest's shared folder, turns a directory into a link after the review."""
    before = outside(workspace)
    await as_root(vm, 'mkdir -p "$U/src"; echo guest > "$U/src/secret"; echo guest > "$U/src/file"')

    with await vm.changes() as changes:
        (workspace / "src").rename(workspace / "kept")
        (workspace / "src").symlink_to("..")
        outcomes = {outcome.path: outcome.status for outcome in changes.apply(force=True)}

    assert outcomes["src/secret"] == "failed"
    assert outside(workspace) == before
    assert (workspace / "kept" / "file").read_text() == "host\n"


async def test_devices_fifos_and_set_ids_never_reach_the_host(vm: Sandbox, workspace: Path) -> None:
    await as_root(
        vm,
        'mknod "$U/disk" b 254 0; mknod "$U/tty" c 5 1; mkfifo "$U/fifo"; cp /bin/true "$U/suid"; '
        'chmod 4755 "$U/suid"; cp /bin/true "$U/sgid"; chmod 2755 "$U/sgid"; '
        'mkdir "$U/sticky"; chmod 7777 "$U/sticky"; echo 1 > "$U/plain"',
    )

    with await vm.changes() as changes:
        outcomes = {
            outcome.path: outcome.status for outcome in changes.apply(force=True, guarded=True)
        }

    refused = {path for path, status in outcomes.items() if status == "refused"}
    assert refused == {"disk", "tty", "fifo", "suid", "sgid"}
    for path in workspace.rglob("*"):
        assert stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFREG, stat.S_IFDIR)
        assert not path.lstat().st_mode & 0o7000
    assert (workspace / "plain").read_text() == "1\n"


async def test_whiteouts_delete_only_what_the_reviewer_is_told(
    vm: Sandbox, workspace: Path
) -> None:
    """One entry that stands for a whole directory: each file it would delete is named."""
    for number in range(300):
        (workspace / "src" / f"{number}").touch()
    await as_root(vm, 'rm -rf "$U/src"; mknod "$U/src" c 0 0; mknod "$U/not-there" c 0 0')

    with await vm.changes() as changes:
        deleted = [change.path for change in changes if change.kind == "deleted"]
        diff = changes.diff()

    assert len(deleted) == 302
    assert diff.count("deleted file mode") == 301
    assert (workspace / "src" / "299").exists()


async def test_sizes_without_end_are_bounded(
    vm: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse files, and more files than anybody reads: the host's memory and temporary files stay small."""
    await as_root(
        vm,
        'truncate -s 8T "$U/sparse"; truncate -s 60M "$U/large"; mkdir "$U/many"; cd "$U/many"; '
        "seq 20000 | xargs touch",
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    peak = Peak()

    with pytest.raises(CopyError, match="more than 1000"):
        await vm.changes(limits=CopyLimits(max_entries=1000, max_bytes=1024**2))
    await as_root(vm, 'rm -r "$U/many"')
    with await vm.changes(limits=CopyLimits(max_entries=1000, max_bytes=1024**2)) as changes:
        refused = {change.path for change in changes if "more bytes" in change.refusal}

    assert refused == {"sparse", "large"}
    assert (
        peak.growth_mib() < 20
    )  # the smaller file has 60, which a heap of the runner's cannot hide
    assert list(temporary.iterdir()) == []


async def test_names_are_one_component_and_shown_escaped(vm: Sandbox, workspace: Path) -> None:
    """Newlines, escapes, quotes and bytes that are no text: applied under just that name, shown without effect."""
    name = b"\x1b]0;owned\x07\n\r\xff\"'\\ \xe2\x80\xaename"
    await vm.files.write_bytes(f"/workspace/{os.fsdecode(name)}", b"x")

    with await vm.changes() as changes:
        (change,) = changes
        diff = changes.diff()
        changes.apply()

    assert [os.fsencode(path.name) for path in workspace.iterdir()].count(name) == 1
    assert str(change).isprintable()
    assert printable(diff.splitlines()[0]) == diff.splitlines()[0]


async def test_a_guest_that_goes_on_writing_changes_nothing_that_was_looked_at(
    vm: Sandbox, workspace: Path
) -> None:
    """A program rewrites a file all the time: what the diff showed is what is applied, byte for byte."""
    writer = await vm.spawn("while date +%N > note; do echo other >> note; echo written; done")
    await anext(aiter(writer.stdout))

    with await vm.changes() as changes:
        shown = changes.read("note")
        changes.apply(["note"])
        assert (workspace / "note").read_bytes() == shown == changes.read("note")
    await writer.kill_all()
