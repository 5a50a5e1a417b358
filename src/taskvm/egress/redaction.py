"""Secrets in responses: what a server repeats of a value comes back to the guest as the placeholder.

Looked at are the headers, and bodies of text that are not compressed, of any length, as they
stream; answers of a secret's own hosts only, since nobody else has the value. Found is the value as
it is, and as URLs, JSON and HTML write it. A server that encodes it in another way, or cuts it
into pieces, still shows it: a secret belongs only to hosts that do not repeat it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import quote, quote_plus

from taskvm.egress.boundsecret import BoundSecret
from taskvm.egress.injection import MIN_TRACED_VALUE
from taskvm.egress.replacing import Replacer, any_of

Header = tuple[bytes, bytes]

# As html.escape: importing that module, with its table of all entities, costs 10 ms.
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})
_TEXT = frozenset(
    {
        b"", b"application/javascript", b"application/json", b"application/x-javascript",
        b"application/x-ndjson", b"application/x-www-form-urlencoded", b"application/xml",
        b"application/yaml", b"application/graphql",
    }
)  # fmt: skip


class Redactor:
    """Turns the values of secrets back, in one response. `on_find` gets the name of each."""

    def __init__(
        self,
        secrets: Iterable[BoundSecret],
        echoes: Mapping[bytes, tuple[str, bytes]],
        on_find: Callable[[str], None],
    ) -> None:
        self._on_find = on_find
        self._found: dict[bytes, tuple[str, bytes]] = {
            text: (bound.secret.name, bound.placeholder.encode())
            for bound in secrets
            for value in bound.values
            if len(value) >= MIN_TRACED_VALUE
            for text in _spellings(value.decode())
        }
        self._found |= echoes
        self._pattern = any_of(self._found)

    def headers(self, headers: Sequence[Header]) -> list[Header]:
        """Return the headers, or the trailer, for the guest."""
        return [(self.text(name), self.text(value)) for name, value in headers]

    def text(self, text: bytes) -> bytes:
        """Return a whole text for the guest."""
        return self._pattern.sub(lambda match: self._replace(match.group()), text)

    def body(self) -> Replacer:
        """Return what the body goes through."""
        return Replacer(self._found, self._replace)

    def _replace(self, text: bytes) -> bytes:
        name, placeholder = self._found[text]
        self._on_find(name)
        return placeholder


def is_readable(headers: Iterable[Header]) -> bool:
    """Say whether a response's body is text that is not compressed."""
    fields = {name.lower(): value.strip().lower() for name, value in headers}
    media = fields.get(b"content-type", b"").partition(b";")[0].strip()
    is_text = media.startswith(b"text/") or media in _TEXT or media.endswith((b"+json", b"+xml"))
    return is_text and fields.get(b"content-encoding", b"identity") in (b"", b"identity")


def _spellings(value: str) -> set[bytes]:
    json_text = json.dumps(value)[1:-1]
    texts = {
        value, quote(value, safe=""), quote(value), quote_plus(value), value.translate(_HTML), json_text,
        json.dumps(value, ensure_ascii=False)[1:-1], json_text.replace("/", "\\/"),
    }  # fmt: skip
    return {text.encode() for text in texts}
