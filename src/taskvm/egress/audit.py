"""The audit record: one JSON line for every decision about what leaves a sandbox, or enters it.

Rule 1: one schema (`AuditEvent`), written down in its fields; a consumer needs nothing else.
Rule 2: text from the guest cannot forge or break a line: JSON escapes, printable ASCII only,
        bounded lengths.
Rule 3: no secret's value and no query string is ever in it (paths are cut at `?`).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Literal

import msgspec

MAX_TEXT = 512  # characters of a reason, a rule, a hint
MAX_PATH = 1024
MAX_NAMES = 64

Kind = Literal["ask", "dns", "connect", "tls", "request", "response", "secret", "ingress", "log"]
Verdict = Literal["allow", "deny", "error"]

_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


class AuditEvent(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One decision, or the end of what was decided. Fields without a value are left out.

    kind: `ask` a person was asked about a host;
    kind: `dns` a name was asked for; `connect` the guest opened, or the host dialled, a connection;
    `tls` a handshake (with `passthrough` as its rule: bytes that pass unread, begun, and ended);
    `request` a request was judged (written before its first byte leaves); `response` how that
    request ended;
    `secret` a secret was put into a request, or kept out of it;
    `ingress` the host listens for the guest's `guest_port` (no `connection`), or somebody connected
    there: when it was opened, and when it was over; `log` the record itself (full, or
    lines left out).
    """

    time: str  # UTC, RFC 3339, milliseconds
    sandbox: str
    kind: Kind
    decision: Verdict  # error: allowed, and then it failed
    rule: str = ""  # the text of the rule that decided, or the name of a built-in one
    reason: str = ""
    connection: int = 0  # the stream's number; joins the events of one connection
    exec: int = 0  # `Process.id` of who connected, as the guest says; only of one that ran
    host: str = ""
    address: str = ""  # what was connected to, or asked for by number; ingress: who connected
    port: int = 0
    guest_port: int = 0  # of ingress: the server's in the guest
    scheme: str = ""  # of a request
    method: str = ""
    path: str = ""  # without the query
    status: int = 0
    bytes_up: int = 0  # of the request's body; ingress: out of the guest
    bytes_down: int = 0  # of the response's body; ingress: into the guest
    duration_ms: int = 0
    secrets: tuple[str, ...] = ()  # names
    omitted: int = 0  # events left out because the record was full


def render_time(time_ns: int) -> str:
    """Return nanoseconds since the epoch as RFC 3339 with milliseconds."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds // 1_000_000:03d}Z"


def render_event(event: AuditEvent) -> bytes:
    """Return the event as one line that ends in a newline, its text made printable and bounded."""
    safe = msgspec.structs.replace(
        event,
        sandbox=_clean(event.sandbox, MAX_TEXT),
        rule=_clean(event.rule, MAX_TEXT),
        reason=_clean(event.reason, MAX_TEXT),
        host=_clean(event.host, MAX_TEXT),
        address=_clean(event.address, MAX_TEXT),
        scheme=_clean(event.scheme, 32),
        method=_clean(event.method, 32),
        path=_clean(event.path.partition("?")[0], MAX_PATH),
        secrets=tuple(_clean(name, MAX_TEXT) for name in event.secrets[:MAX_NAMES]),
    )
    return msgspec.json.encode(safe) + b"\n"


def parse_event(line: bytes) -> AuditEvent:
    """Read one line back. Raises msgspec.ValidationError or msgspec.DecodeError."""
    return msgspec.json.decode(line, type=AuditEvent)


def _clean(text: str, limit: int) -> str:
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return _UNPRINTABLE.sub(lambda match: f"\\u{{{ord(match.group()):x}}}", cut)
