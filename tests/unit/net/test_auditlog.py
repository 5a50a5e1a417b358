"""The audit file: ours alone, whole lines, and no egress without a record."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from taskvm.egress.audit import AuditEvent, parse_event
from taskvm.errors import HostError
from taskvm.net.auditlog import AuditLog


def test_events_are_appended_to_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"")
    path.chmod(0o644)
    for host in ("a.test", "b.test"):
        log = AuditLog.open(path, "box")
        assert log.record("dns", "allow", host=host)
        log.close()

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [parse_event(line).host for line in path.read_bytes().splitlines()] == [
        "a.test",
        "b.test",
    ]


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit", "box")

    with pytest.raises(HostError, match="another sandbox"):
        AuditLog.open(tmp_path / "audit", "box")
    log.close()
    AuditLog.open(tmp_path / "audit", "box").close()


def test_a_planted_link_or_pipe_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")

    for name in ("link", "pipe", "missing/audit"):
        with pytest.raises(HostError, match=name):
            AuditLog.open(tmp_path / name, "box")
    assert not (tmp_path / "target").exists()


def test_a_full_log_says_so_once_and_refuses_from_then_on() -> None:
    lines: list[bytes] = []
    seen: list[AuditEvent] = []
    log = AuditLog(lines.append, "box", listener=seen.append, max_bytes=200)

    recorded = [log.record("dns", "deny", host="a.test", reason="x" * 40) for _ in range(4)]

    assert recorded == [True, False, False, False]
    assert [parse_event(line).kind for line in lines] == ["dns", "log"]
    assert [event.kind for event in seen] == ["dns", "log"]


def test_a_failing_disk_refuses_too() -> None:
    def fail(line: bytes) -> None:
        raise OSError("no space left")

    assert not AuditLog(fail, "box").record("dns", "allow")


def test_a_closed_log_records_nothing(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit", "box")
    log.close()
    log.close()

    assert not log.record("dns", "allow")
    assert (tmp_path / "audit").read_bytes() == b""
