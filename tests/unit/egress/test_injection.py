"""Putting secrets into requests: where, and nowhere else."""

from __future__ import annotations

import base64
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.egress.boundsecret import BoundSecret, bind_secrets
from taskvm.egress.injection import InjectionRefused, Injector
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import UsageError

VALUE = "sk-live-0123456789abcdef"
POLICY = Policy.parse(["api.test", "*.other.test", "port.test:8443"], ["10.0.0.1"])


def bind(*secrets: Secret) -> tuple[BoundSecret, ...]:
    return bind_secrets(POLICY, secrets, os.urandom)


KEY, TOKEN = bind(
    Secret("KEY", VALUE, hosts=["api.test"]),
    Secret("TOKEN", "tok_abcdefghijkl", hosts=["a.other.test", "api.test"], headers=["X-Token"]),
)
INJECTOR = Injector([KEY, TOKEN])


def inject(*headers: tuple[str, str], host: str = "api.test", target: str = "/") -> dict[str, str]:
    pairs = [(name.encode(), value.encode()) for name, value in headers]
    injected = INJECTOR.inject("https", host, 443, target.encode(), pairs)
    sent = {name.decode(): value.decode() for name, value in injected.headers}
    knows = host in ("api.test", "a.other.test")  # a value: what it answers must be readable
    assert (sent.pop("Accept-Encoding", "") == "identity") is knows
    return sent


def test_a_placeholder_is_random_and_names_its_secret() -> None:
    again = bind(KEY.secret)[0]

    assert KEY.placeholder.startswith("taskvm_secret_KEY_")
    assert len(KEY.placeholder) == len("taskvm_secret_KEY_") + 48
    assert again.placeholder != KEY.placeholder


def test_the_headers_with_values_are_not_shown() -> None:
    headers = [(b"Authorization", KEY.placeholder.encode())]

    injected = INJECTOR.inject("https", "api.test", 443, b"/", headers)

    assert VALUE.encode() in injected.headers[0][1]
    assert VALUE not in repr(injected)


def test_each_secret_goes_into_its_own_headers() -> None:
    sent = inject(
        ("Authorization", f"Bearer {KEY.placeholder}"), ("x-token", f"a{TOKEN.placeholder}b")
    )

    assert sent == {"Authorization": f"Bearer {VALUE}", "x-token": "atok_abcdefghijklb"}


@pytest.mark.parametrize(
    ("header", "bound", "host"),
    [
        ("X-Token", KEY, "api.test"),
        ("Authorization", TOKEN, "api.test"),
        ("X-API-Key", KEY, "a.other.test"),
        ("X-Token", TOKEN, "b.other.test"),
    ],
)
def test_a_placeholder_in_the_wrong_place_is_refused(
    header: str, bound: BoundSecret, host: str
) -> None:
    with pytest.raises(InjectionRefused) as caught:
        inject((header, f"x {bound.placeholder}"), host=host)

    assert caught.value.secret == bound.secret.name
    assert bound.secret.reveal() not in str(caught.value) + caught.value.hint


def test_a_value_is_never_searched_for_placeholders() -> None:
    (trick,) = bind(Secret("TRICK", f"x{KEY.placeholder}", hosts=["api.test"]))
    headers = [(b"Authorization", trick.placeholder.encode())]

    sent = Injector([KEY, trick]).inject("https", "api.test", 443, b"/", headers)

    assert sent.headers[0] == (b"Authorization", f"x{KEY.placeholder}".encode())
    assert sent.used == ("TRICK",)


@pytest.mark.parametrize("scheme", ["Basic", "basic", "BASIC \t"])
@pytest.mark.parametrize("cut", ["", "="])
def test_basic_credentials_are_opened_however_they_are_written(scheme: str, cut: str) -> None:
    inner = f"user:{KEY.placeholder}"
    text = base64.b64encode(inner.encode()).decode().rstrip("=") + cut

    sent = inject(("Authorization", f"{scheme} {text}"))["Authorization"]

    assert base64.b64decode(sent.split()[-1]) == f"user:{VALUE}".encode()


def test_basic_credentials_with_a_foreign_placeholder_are_refused() -> None:
    text = base64.b64encode(f"user:{TOKEN.placeholder}".encode()).decode()

    with pytest.raises(InjectionRefused):
        inject(("Authorization", f"Basic {text}"))


def test_a_host_on_another_port_is_another_host() -> None:
    (bound,) = bind(Secret("P", VALUE, hosts=["port.test:8443"]))

    assert bound.may_go_to("https", "port.test", 8443)
    assert bound.may_go_to("http", "port.test", 8443)
    assert not bound.may_go_to("https", "port.test", 443)
    assert not KEY.may_go_to("http", "api.test", 80)


@pytest.mark.parametrize("host", ["evil.test", "*.api.test", "other.test", "port.test", "10.0.0.2"])
def test_a_secret_for_a_host_that_is_not_allowed_is_refused(host: str) -> None:
    with pytest.raises(UsageError) as caught:
        bind(Secret("KEY", VALUE, hosts=[host]))

    assert host in caught.value.next_step
    assert VALUE not in str(caught.value)


def test_two_secrets_with_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two secrets"):
        bind(KEY.secret, KEY.secret)


def test_a_secret_for_an_allowed_address_is_bound() -> None:
    assert bind(Secret("KEY", VALUE, hosts=["10.0.0.1"]))[0].may_go_to("https", "10.0.0.1", 443)


TEXT = st.binary(max_size=60)
# What says which part of a content to send, and in which coding: dropped where a secret goes.
CHOOSING = (b"a-im", b"accept-charset", b"accept-encoding", b"if-range", b"range")
HEADER_NAME = TEXT.filter(lambda name: name.lower() not in CHOOSING)


@given(st.lists(st.tuples(HEADER_NAME, TEXT), max_size=5), TEXT)
def test_a_request_without_traces_passes_unchanged(
    headers: list[tuple[bytes, bytes]], target: bytes
) -> None:
    injected = INJECTOR.inject("https", "api.test", 443, target, headers)
    elsewhere = INJECTOR.inject("https", "stranger.test", 443, target, headers)

    assert injected.headers == [*headers, (b"Accept-Encoding", b"identity")]
    assert elsewhere.headers == headers
    assert injected.used == ()


@given(
    TEXT, TEXT, st.sampled_from([KEY, TOKEN]), st.sampled_from(["authorization", "x-token", "x"])
)
def test_a_value_leaves_only_in_its_header(
    before: bytes, after: bytes, bound: BoundSecret, header: str
) -> None:
    placeholder, value = bound.placeholder.encode(), bound.secret.reveal().encode()
    right = header == ("authorization" if bound is KEY else "x-token")
    try:
        injected = INJECTOR.inject(
            "https", "api.test", 443, b"/", [(header.encode(), before + placeholder + after)]
        )
    except InjectionRefused:
        assert not right
        return

    assert right
    assert injected.headers[0] == (header.encode(), before + value + after)


@given(TEXT, TEXT)
def test_a_placeholder_never_passes_in_a_target(before: bytes, after: bytes) -> None:
    with pytest.raises(InjectionRefused):
        INJECTOR.inject("https", "api.test", 443, before + KEY.placeholder.encode() + after, [])
