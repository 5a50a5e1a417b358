"""Secrets in responses: what a server repeats of a value comes back to the guest as the placeholder.

Looked at are the headers, and bodies that are not compressed nor of a type that is known to be binary, of any
length, as they stream; answers of a secret's own hosts only, since nobody else has the value. Found is the value as
it is, as URLs, JSON and HTML write it, and within base64 (a page that shows Basic credentials). A
server that encodes it in another way, or cuts it into pieces, still shows it: a secret belongs only
to hosts that do not repeat it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import quote, quote_plus

from taskvm.egress.boundsecret import BoundSecret
from taskvm.egress.injection import MIN_TRACED_VALUE, SEGMENT_SAFE
from taskvm.egress.replacing import Replacer, any_of

Header = tuple[bytes, bytes]

# As html.escape: importing that module, with its table of all entities, costs 10 ms.
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})
_HTML_IN_NUMBERS = _HTML | str.maketrans({'"': "&#34;", "'": "&#39;"})  # Go's html, Python's jinja
_ESCAPED_IN_JSON = ("&<>", "&<>'+")  # by Go and Rails; by C#
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_ESCAPE = re.compile(r"%[0-9A-F]{2}")
# What programs leave unescaped in URLs besides letters, digits and -._~: Python (query, path), we (a path's segment),
# JavaScript (encodeURIComponent, encodeURI), Go (a path's segment, a path).
_SAFE_IN_URLS = ("", "/", SEGMENT_SAFE, "!*'()", ";,/?:@&=+$!*'()#", "$&+=:@", "$&+,/:;=@")
# What is none of these is taken for text: a type that nobody has heard of hides nothing.
_BINARY = frozenset(
    {
        b"application/cbor", b"application/gzip", b"application/java-archive", b"application/msgpack",
        b"application/octet-stream", b"application/pdf", b"application/protobuf", b"application/wasm",
        b"application/x-7z-compressed", b"application/x-bzip2", b"application/x-compressed",
        b"application/x-compressed-tar", b"application/x-debian-package", b"application/x-gtar",
        b"application/x-gzip", b"application/x-msgpack", b"application/x-protobuf", b"application/x-rpm",
        b"application/x-tar", b"application/x-tgz", b"application/x-xz", b"application/x-zip-compressed",
        b"application/zip", b"application/zstd", b"binary/octet-stream",
    }
)  # fmt: skip
_BINARY_BEGINNINGS = (
    b"application/grpc", b"application/vnd.debian.binary", b"application/vnd.google.protobuf",
    b"application/x-git-", b"audio/", b"font/", b"image/", b"video/",
)  # fmt: skip
_BINARY_ENDINGS = (b"+cbor", b"+gzip", b"+zip", b"+zstd", b".gzip")
_TEXT_ENDINGS = (b"+json", b"+xml", b"+yaml")  # image/svg+xml


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
    """Say whether a response's body may be text that is not compressed; with two types, whether one of them may."""
    media = [value.partition(b";")[0] for value in _values_of(headers, b"content-type")] or [b""]
    codings = b",".join(_values_of(headers, b"content-encoding")).split(b",")
    return any(map(_is_text, media)) and {each.strip() for each in codings} <= {b"", b"identity"}


def _values_of(headers: Iterable[Header], name: bytes) -> list[bytes]:
    return [value.strip().lower() for key, value in headers if key.lower() == name]


def _is_text(media: bytes) -> bool:
    kind = media.strip()
    if kind.endswith(_TEXT_ENDINGS):
        return True
    return not (
        kind in _BINARY or kind.startswith(_BINARY_BEGINNINGS) or kind.endswith(_BINARY_ENDINGS)
    )


def _spellings(value: str) -> set[bytes]:
    json_text = json.dumps(value)[1:-1]
    escaped = {quote_plus(value), *(quote(value, safe=safe) for safe in _SAFE_IN_URLS)}
    texts = {
        value, *escaped, *(_ESCAPE.sub(lambda match: match[0].lower(), text) for text in escaped),
        value.translate(_HTML), value.translate(_HTML_IN_NUMBERS), json_text,
        json.dumps(value, ensure_ascii=False)[1:-1], json_text.replace("/", "\\/"),
        *(json_text.translate(_in_json(signs)) for signs in _ESCAPED_IN_JSON),
    }  # fmt: skip
    return {text.encode() for text in texts} | _in_base64(value.encode())


def _in_json(signs: str) -> dict[int, str]:
    return str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in signs})


def _in_base64(value: bytes) -> set[bytes]:
    """Return what base64 of any text has where the value stands in it: one for each place within three bytes."""
    found = set()
    for before, foreign in (
        (0, 0),
        (1, 2),
        (2, 3),
    ):  # bytes, and the characters they have a part in
        whole = (before + len(value)) * 8 // 6  # characters that nothing after the value changes
        text = base64.b64encode(bytes(before) + value)[foreign:whole]
        found |= {text, text.translate(_URL_SAFE)}
    return found
