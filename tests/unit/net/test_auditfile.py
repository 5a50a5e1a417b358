"""The parts of an audit file (taskvm.net.auditfile): moved aside, never lost while their sandbox runs."""

from __future__ import annotations

import os
import threading
from itertools import islice
from pathlib import Path

import pytest

from taskvm import auditreading
from taskvm.auditreading import find_audit_log, read_audit
from taskvm.egress.audit import AuditEvent, render_event, render_time
from taskvm.errors import HostError, UsageError
from taskvm.net.auditfile import KEPT_PARTS, AuditFile, find_parts
from taskvm.net.auditlog import AuditLog


def line(number: int) -> bytes:
    event = AuditEvent(
        time=render_time(0), sandbox="box", kind="dns", decision="deny", host=f"h{number}.test"
    )
    return render_event(event)


def hosts(path: Path) -> list[str]:
    return [event.host for event in read_audit(path)]


def test_a_long_file_is_continued_in_another_and_every_line_stays(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    file = AuditFile(path, part_bytes=3 * len(line(0)))
    for number in range(40):
        file.append(line(number))
    file.close()

    assert hosts(path) == [f"h{number}.test" for number in range(40)]
    assert len(find_parts(path)) > KEPT_PARTS
    assert all(part.stat().st_size <= 3 * len(line(10)) for part in find_parts(path))
    assert {part.stat().st_mode & 0o777 for part in find_parts(path)} == {0o600}


def test_the_next_writer_keeps_a_bounded_past(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    other = tmp_path / "audit.jsonl.bak"
    other.write_bytes(b"mine")
    for number in range(1, 20):
        Path(f"{path}.{number}").write_bytes(line(number))

    AuditFile(path).close()

    assert [part.suffix for part in find_parts(path)[:-1]] == [f".{n}" for n in range(12, 20)]
    assert other.read_bytes() == b"mine"


def test_a_part_that_cannot_be_begun_is_no_record(tmp_path: Path) -> None:
    file = AuditFile(tmp_path / "audit", part_bytes=10)
    log = AuditLog(file.append, "box")
    assert log.record("dns", "allow", host="a.test")

    (tmp_path / "audit").unlink()

    assert not log.record("dns", "allow", host="b.test")
    file.close()


def test_a_link_planted_at_the_path_is_not_written_through(tmp_path: Path) -> None:
    file = AuditFile(tmp_path / "audit", part_bytes=10)
    file.append(line(0))
    (tmp_path / "audit").rename(tmp_path / "away")
    (tmp_path / "audit").symlink_to(tmp_path / "planted")

    file.append(line(1))
    file.close()

    assert not (tmp_path / "planted").exists()
    assert (tmp_path / "audit").read_bytes() == line(1)


def test_a_reader_follows_across_parts(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    file = AuditFile(path, part_bytes=200)
    file.append(line(0))
    events = read_audit(path, follow=True)
    first = next(events)

    def write() -> None:
        for number in range(1, 12):
            file.append(line(number))

    writer = threading.Timer(0.05, write)
    writer.start()
    rest = list(islice(events, 11))
    writer.join()
    events.close()
    file.close()

    assert [event.host for event in (first, *rest)] == [f"h{number}.test" for number in range(12)]


@pytest.mark.parametrize("follow", [False, True])
def test_parts_that_begin_while_a_reader_looks_for_them_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    """What it finds is not true any more when it opens it."""
    path = tmp_path / "audit.jsonl"
    file = AuditFile(path, part_bytes=1)
    unwritten = iter(range(12))

    def write() -> None:
        for number in islice(unwritten, 2):
            file.append(line(number))

    def outdated(path: Path) -> list[Path]:
        parts = find_parts(path)
        write()
        return parts

    write()
    monkeypatch.setattr(auditreading, "find_parts", outdated)
    events = list(islice(read_audit(path, follow=follow), 12))
    file.close()

    assert [event.host for event in events] == [f"h{number}.test" for number in range(12)]


def test_a_record_whose_next_part_could_not_be_begun_is_read(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.with_name("audit.jsonl.1").write_bytes(line(0))

    assert hosts(path) == ["h0.test"]


def test_a_line_that_a_crash_has_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(line(0) + line(1)[:20] + b"\n{}\n" + line(2) + line(3)[:-5])

    assert hosts(path) == ["h0.test", "h2.test"]


def test_a_log_is_found_by_its_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "taskvm" / "audit"
    with pytest.raises(UsageError, match="there is none"):
        find_audit_log()
    folder.mkdir(parents=True)
    for age, name in enumerate(("new", "old")):
        (folder / f"{name}.jsonl").touch()
        os.utime(folder / f"{name}.jsonl", (1000 - age, 1000 - age))

    assert find_audit_log("old") == folder / "old.jsonl"
    assert find_audit_log() == folder / "new.jsonl"
    with pytest.raises(UsageError, match="no such file"):
        find_audit_log("../../etc")
    with pytest.raises(UsageError, match="read the audit log"):
        list(read_audit(folder))
    with pytest.raises(HostError, match="not a regular file|directory"):
        AuditFile(folder)
