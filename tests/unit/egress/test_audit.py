"""The audit record: one line for an event, whatever the guest puts into it."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from taskvm.egress.audit import AuditEvent, parse_event, render_event, render_time


def event(**fields: object) -> AuditEvent:
    known = {"time": render_time(0), "sandbox": "box", "kind": "request", "decision": "deny"}
    return AuditEvent(**(known | fields))  # type: ignore[arg-type]  # as the test gives them


def test_a_line_holds_what_is_set_and_nothing_else() -> None:
    line = render_event(event(host="a.com", port=443))

    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.000Z", "sandbox": "box", "kind": "request", "decision": "deny",
        "host": "a.com", "port": 443,
    }  # fmt: skip


def test_time_is_utc_with_milliseconds() -> None:
    assert render_time(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123Z"


def test_the_query_is_not_recorded() -> None:
    assert parse_event(render_event(event(path="/a?token=secret"))).path == "/a"


def test_terminal_escapes_and_line_separators_are_spelled_out() -> None:
    line = render_event(event(path="/\x1b[2J\x9b\u2028\n", method="G\rET"))

    assert line.isascii()
    assert line.count(b"\n") == 1
    assert b"\x1b" not in line
    assert b"u{1b}" in line


@given(st.text(), st.text(max_size=5000), st.text(max_size=5000), st.lists(st.text()))
def test_no_text_forges_or_lengthens_a_line(
    host: str, path: str, reason: str, secrets: list[str]
) -> None:
    line = render_event(event(host=host, path=path, reason=reason, secrets=tuple(secrets)))

    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])
    assert len(line) < 700_000
    assert parse_event(line).decision == "deny"


def test_a_long_path_is_cut() -> None:
    assert len(parse_event(render_event(event(path="/" + "a" * 5000))).path) == 1024
