"""A secret shows its name to everybody and its value to nobody who does not ask by `reveal()`."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import traceback
from pathlib import Path

import msgspec
import pytest

from taskvm.egress.secret import DEFAULT_HEADERS, Secret
from taskvm.errors import UsageError

VALUE = "sk-live-0123456789abcdef"


@pytest.fixture
def secret() -> Secret:
    return Secret.from_value("API_KEY", VALUE, hosts=["api.example.com"])


def test_reveal_is_the_way_out(secret: Secret) -> None:
    assert secret.reveal() == VALUE


def test_no_rendering_shows_the_value(secret: Secret) -> None:
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!s:>80}",
        repr([secret]),
    ]

    assert not any(VALUE in text for text in shown)
    assert "API_KEY" in shown[0]


@pytest.mark.parametrize(
    "export",
    [
        pickle.dumps,
        json.dumps,
        msgspec.json.encode,
        vars,
        dataclasses.asdict,
        lambda secret: format(secret, "10"),
    ],
)
def test_no_export_takes_the_value(secret: Secret, export: object) -> None:
    with pytest.raises(TypeError) as caught:
        export(secret)  # type: ignore[operator]  # each is a function of one argument

    assert VALUE not in "".join(traceback.format_exception(caught.value))


def test_a_copy_is_the_same_secret(secret: Secret) -> None:
    assert copy.copy(secret) is secret
    assert copy.deepcopy([secret])[0] is secret


def test_a_secret_cannot_be_changed(secret: Secret) -> None:
    with pytest.raises(AttributeError):
        secret.hosts = ("evil.example",)  # type: ignore[misc]  # the point
    with pytest.raises(AttributeError):
        del secret.name


def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("API_KEY", raising=False)

    with pytest.raises(UsageError, match="API_KEY is not set"):
        Secret.from_env("API_KEY", hosts=["a.com"])


def test_a_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", VALUE)

    secret = Secret.from_env("API_KEY", hosts=["a.com"], headers=["X-Key"])

    assert (secret.reveal(), secret.headers, secret.hosts) == (VALUE, ("X-Key",), ("a.com",))


def test_a_file_is_read_without_its_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(VALUE + "\n")

    assert Secret.from_file(path, name="K", hosts=["a.com"]).reveal() == VALUE


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb", b"\xff\xfe", b"x" * 20_000, b" padded"])
def test_a_file_that_holds_no_value_is_refused_without_showing_it(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)

    with pytest.raises(UsageError) as caught:
        Secret.from_file(path, name="K", hosts=["a.com"])

    text = "".join(traceback.format_exception(caught.value))
    assert "xxxxxxxxxx" not in text
    assert "xff" not in text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing-here: No such file"):
        Secret.from_file(tmp_path / "nothing-here", name="K", hosts=["a.com"])


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a-b"},
        {"name": ""},
        {"name": "1A"},
        {"name": "A\n"},
        {"hosts": []},
        {"hosts": "a.com"},
        {"headers": []},
        {"headers": ["Proxy-Authorization"]},
        {"headers": ["host"]},
        {"headers": ["Bad Header"]},
        {"headers": ["X-A\r\nX-B"]},
        {"value": ""},
        {"value": "a\r\nX-Injected: 1"},
        {"value": "\udc80\udc80\udc80"},
    ],
)
def test_what_is_no_secret_is_refused(change: dict[str, object]) -> None:
    fields = {"name": "K", "value": VALUE, "hosts": ["a.com"], "headers": DEFAULT_HEADERS} | change

    with pytest.raises(UsageError) as caught:
        Secret(**fields)  # type: ignore[arg-type]  # wrong ones too

    assert VALUE not in str(caught.value)
