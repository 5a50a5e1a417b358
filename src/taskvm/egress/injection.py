"""Secrets in requests: the guest writes a placeholder, the host puts the value there or refuses.

Rule 1: a placeholder is replaced only in a request to one of its secret's hosts, in one of its
        secret's headers or further places, over TLS (in clear only where the secret's host names the
        port, and not for 443). Anywhere else in the head it refuses the request.
Rule 2: one pass over each text, never over its result: a value that looks like a placeholder stays
        a value.
Rule 3: a real value that comes from the guest refuses the request: it leaked, and must not travel
        on. A value that was replaced or revoked is one still.
Rule 4: called after the policy decision; what is logged names the secret, never its value.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, quote_plus, unquote_to_bytes

from taskvm.egress.boundsecret import BoundSecret, Scheme
from taskvm.egress.replacing import Replacer, any_of
from taskvm.egress.secret import Place

# Shorter values occur in ordinary requests by chance.
MIN_TRACED_VALUE = 8

Header = tuple[bytes, bytes]

_BASIC = re.compile(rb"(basic[ \t]+)([A-Za-z0-9+/_=-]+)\Z", re.IGNORECASE)
# What a path's segment may hold unescaped besides letters and digits (RFC 3986 section 3.3).
SEGMENT_SAFE = "!$&'()*+,;=:@~"
# A server may ignore Range (RFC 9110 section 14.2): the guest must not have a value in two halves. A-IM chooses
# parts and codings too (RFC 3229), Accept-Charset the letters.
_CHOOSING_PARTS = frozenset({b"a-im", b"accept-charset", b"accept-encoding", b"if-range", b"range"})
_FIX_OTHER_PLACE = "Send it in one of the secret's headers, such as Authorization"


@dataclass(frozen=True, slots=True)
class Injected:
    """What is sent: values are in it. `used` are the names of the secrets.

    `echoes` are texts with a value in another encoding: its secret's name, and what the guest wrote.
    """

    target: bytes = field(repr=False)
    headers: list[Header] = field(repr=False)
    used: tuple[str, ...] = ()
    echoes: dict[bytes, tuple[str, bytes]] = field(repr=False, default_factory=dict)


class InjectionRefused(Exception):  # noqa: N818 - an outcome of a rule, named like the rule's word
    """Raised when a request must not be forwarded.

    `secret` is the name; the message never holds a value.
    """

    def __init__(self, secret: str, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.secret = secret
        self.reason = reason
        self.hint = hint


class Injector:
    """Puts the values of one sandbox's secrets into its requests. Immutable."""

    def __init__(self, secrets: Iterable[BoundSecret]) -> None:
        self.secrets = tuple(secrets)
        self._by_placeholder = {bound.placeholder.encode(): bound for bound in self.secrets}
        self._placeholders = any_of(self._by_placeholder)
        self._by_value = {
            value: bound
            for bound in self.secrets
            for value in bound.values
            if len(value) >= MIN_TRACED_VALUE
        }
        self._values = any_of(self._by_value)
        # Names of hosts have no case: they come in lower case.
        self._by_lowered = {value.lower(): bound for value, bound in self._by_value.items()}
        self._lowered = any_of(self._by_lowered)

    def inject(
        self, scheme: Scheme, host: str, port: int, target: bytes, headers: Sequence[Header]
    ) -> Injected:
        """Return the head with values in place of placeholders. Raises InjectionRefused."""
        pass_ = _Pass(self, scheme, host, port)
        new_target = pass_.target(target)
        sent: list[Header] = []
        for name, value in headers:
            self.refuse_traces(name, "a header's name")
            self._refuse_values(value, "a header")
            sent.append((name, pass_.header(name.decode("latin-1").lower(), value)))
        if any(bound.is_known_to(host, port) for bound in self.secrets):
            sent = _asking_plainly(sent)
        return Injected(new_target, sent, tuple(sorted(pass_.used)), pass_.echoes)

    def mentioned(self, target: bytes, headers: Iterable[Header]) -> set[str]:
        """Return the names of the secrets whose placeholder stands in a head."""
        texts = [target, *(value for _, value in headers)]
        texts += [basic[1] for basic in map(_decode_basic, texts) if basic is not None]
        found = {match.group() for text in texts for match in self._placeholders.finditer(text)}
        return {self._by_placeholder[placeholder].secret.name for placeholder in found}

    def for_bodies(self, scheme: Scheme, host: str, port: int) -> list[str]:
        """Return the names of the secrets that a body to this origin may have."""
        return [
            bound.secret.name
            for bound in self.secrets
            if bound.is_for("body") and bound.may_go_to(scheme, host, port)
        ]

    def body(
        self, scheme: Scheme, host: str, port: int, kind: bytes, on_use: Callable[[str], None]
    ) -> tuple[Replacer | None, bool]:
        """Return what a request's body goes through, and whether that may change its length.

        `kind` is its content type; `on_use` gets a secret's name before its value is put in. The
        replacer raises InjectionRefused.
        """
        ours = {key: bound for key, bound in self._by_placeholder.items() if bound.is_for("body")}
        if not ours and not self._by_value:
            return None, False
        encode = _body_encoding(kind)

        def replace(text: bytes) -> bytes:
            bound = ours.get(text)
            if bound is None:
                raise _leaked(self._by_value[text], "the body")
            _check_use(bound, scheme, host, port)
            on_use(bound.secret.name)
            return encode(bound.secret.reveal())

        changes = any(bound.may_go_to(scheme, host, port) for bound in ours.values())
        return Replacer([*ours, *self._by_value], replace), changes

    def refuse_traces(self, text: bytes, place: str) -> None:
        """Raise InjectionRefused when `text`, sent as it is, holds a placeholder or a value."""
        for variant in {text, unquote_to_bytes(text)}:
            if match := self._placeholders.search(variant):
                raise InjectionRefused(
                    self._by_placeholder[match.group()].secret.name,
                    f"a secret's placeholder stands in {place}",
                    _FIX_OTHER_PLACE,
                )
            self._refuse_values(variant, place)

    def without_placeholders(self, text: bytes) -> bytes:
        """Return `text` with the secret's name in brackets for each placeholder."""
        return self._placeholders.sub(
            lambda match: b"{%s}" % self._by_placeholder[match.group()].secret.name.encode(), text
        )

    def find_placeholders(
        self, text: bytes, replace: Callable[[BoundSecret], bytes]
    ) -> tuple[bytes, bytes]:
        """Return `text` with `replace(secret)` for each placeholder, and what is left without them."""
        done = self._placeholders.sub(
            lambda match: replace(self._by_placeholder[match.group()]), text
        )
        return done, self._placeholders.sub(b" ", text)

    def without_values(self, host: str) -> str:
        """Return the name of a host with the secret's name in brackets for each value in it."""
        return self._lowered.sub(
            lambda match: b"{%s}" % self._by_lowered[match.group()].secret.name.encode(),
            host.encode(),
        ).decode()

    def _refuse_values(self, text: bytes, place: str) -> None:
        basic = _decode_basic(text)
        for variant in (text, basic[1]) if basic else (text,):
            if match := self._values.search(variant):
                raise _leaked(self._by_value[match.group()], place)


class _Pass:
    """One request to one origin: what was used, and what could come back."""

    def __init__(self, injector: Injector, scheme: Scheme, host: str, port: int) -> None:
        self._injector = injector
        self._origin = scheme, host, port
        self.used: set[str] = set()
        self.echoes: dict[bytes, tuple[str, bytes]] = {}

    def target(self, target: bytes) -> bytes:
        path, mark, query = target.partition(b"?")
        new_path = self._part("path", path, lambda value: quote(value, safe=SEGMENT_SAFE))
        return new_path + mark + self._part("query", query, lambda value: quote(value, safe=""))

    def header(self, name: str, value: bytes) -> bytes:
        names: list[str] = []

        def place(bound: BoundSecret) -> bytes:
            names.append(bound.secret.name)
            return self._use(bound, header=name).encode()

        basic = _decode_basic(value)
        if basic is not None:
            credentials, rest = self._injector.find_placeholders(basic[1], place)
            if rest != basic[1]:
                encoded = base64.b64encode(credentials)
                self.echoes[encoded] = names[0], value.removeprefix(basic[0])
                return basic[0] + encoded
        return self._injector.find_placeholders(value, place)[0]

    def _part(self, part: Place, text: bytes, encode: Callable[[str], str]) -> bytes:
        def place(bound: BoundSecret) -> bytes:
            if not bound.is_for(part):
                raise InjectionRefused(
                    bound.secret.name,
                    f"a secret's placeholder stands in the {part}",
                    _FIX_OTHER_PLACE,
                )
            return encode(self._use(bound)).encode("ascii")

        done, rest = self._injector.find_placeholders(text, place)
        self._injector.refuse_traces(rest, f"the {part}")  # other spellings, and values
        return done

    def _use(self, bound: BoundSecret, header: str = "") -> str:
        _check_use(bound, *self._origin, header)
        self.used.add(bound.secret.name)
        return bound.secret.reveal()


def _asking_plainly(headers: Iterable[Header]) -> list[Header]:
    """Return the headers of a request whose answer must be whole and readable: what it repeats is turned back.

    Also where the request has no value itself: a server may have stored one that another request brought.
    """
    others = [item for item in headers if item[0].lower() not in _CHOOSING_PARTS]
    return [*others, (b"Accept-Encoding", b"identity")]


def _check_use(bound: BoundSecret, scheme: Scheme, host: str, port: int, header: str = "") -> None:
    secret = bound.secret
    if bound.revoked:
        raise InjectionRefused(
            secret.name, "the secret was revoked", "Ask the owner of this sandbox"
        )
    if header and header not in {allowed.lower() for allowed in secret.headers}:
        raise InjectionRefused(
            secret.name, f"the secret is not sent in the header {header}", _FIX_OTHER_PLACE
        )
    if bound.may_go_to("https", host, port) and scheme == "http":
        if not bound.may_go_to("http", host, port):
            raise InjectionRefused(
                secret.name,
                "the secret is not sent in clear",
                "Use https"
                if port == 443
                else f'Use https, or give the secret the host "{host}:{port}"',
            )
    elif not bound.may_go_to("https", host, port):
        raise InjectionRefused(
            secret.name, "the secret is not for this host", "Ask the owner of this sandbox"
        )


def _leaked(bound: BoundSecret, place: str) -> InjectionRefused:
    return InjectionRefused(
        bound.secret.name,
        f"the value of a secret stands in {place}",
        "The guest must not know it: send the placeholder, and replace the secret",
    )


def _body_encoding(kind: bytes) -> Callable[[str], bytes]:
    """Return how a value is written into a body of this content type, so that it stays one value."""
    media = kind.partition(b";")[0].strip().lower()
    if media == b"application/x-www-form-urlencoded":
        return lambda value: quote_plus(value).encode("ascii")
    if media == b"application/json" or media.endswith(b"+json"):
        return lambda value: json.dumps(value, ensure_ascii=False)[1:-1].encode()
    return lambda value: value.encode()


def _decode_basic(value: bytes) -> tuple[bytes, bytes] | None:
    """Return the scheme and the decoded credentials of `Basic …`, as lenient as a server is."""
    match = _BASIC.match(value)
    if match is None:
        return None
    text = match.group(2).translate(bytes.maketrans(b"-_", b"+/"), b"=")
    try:
        return match.group(1), binascii.a2b_base64(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        return None
