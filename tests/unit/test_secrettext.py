"""taskvm.cli.secrettext: secrets as texts of the command line."""

from pathlib import Path

import pytest

from taskvm import Secret, UsageError
from taskvm.cli.secrettext import read_secret, read_secret_command, read_secret_file

CANARY = "canary-5d1e77"


@pytest.fixture(autouse=True)
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", CANARY)


def test_a_secret_for_hosts_is_as_the_sdk_makes_it() -> None:
    secret, same = (
        read_secret("TOKEN@a.example,b.example:8443"),
        Secret.from_env("TOKEN", hosts=["a.example"]),
    )

    assert secret.hosts == ("a.example", "b.example:8443")
    assert (secret.name, secret.reveal()) == ("TOKEN", CANARY)
    assert (secret.headers, secret.places, secret.shape) == (same.headers, same.places, "")


def test_places_headers_and_a_shape_follow_the_hosts_in_any_order() -> None:
    text = "TOKEN@shape=ghp_*{36},a.example,in=body,header=X-One,in=query,b.example,header=X-Two"

    secret = read_secret(text)

    assert secret.hosts == ("a.example", "b.example")
    assert secret.places == ("query", "body")
    assert secret.headers == ("X-One", "X-Two")
    assert secret.shape == "ghp_" + 36 * "*"


def test_files_and_commands_take_the_same(tmp_path: Path) -> None:
    """An @ or a comma in what comes before belongs to it."""
    path = tmp_path / "a,b@c"
    path.write_text(CANARY)

    from_file = read_secret_file(f"KEY={path}@a.example,in=path")
    printed = read_secret_command(f"KEY=printf %s,%s x@y {CANARY}@a.example,in=path")

    assert (from_file.reveal(), from_file.places) == (CANARY, ("path",))
    assert (printed.reveal(), printed.places) == (f"x@y,{CANARY}", ("path",))


def test_a_command_can_be_run_again_after_a_while(tmp_path: Path) -> None:
    """For tokens that live for an hour only: a login, a broker."""
    path = tmp_path / "token"
    path.write_text("first-token")

    secret = read_secret_command(f"KEY=cat {path}@a.example,refresh=600,in=path")
    path.write_text("second-token")

    assert (secret.refresh_s, secret.places, secret.hosts) == (600, ("path",), ("a.example",))
    assert (secret.reveal(), secret.renewed().reveal()) == ("first-token", "second-token")


@pytest.mark.parametrize("said", ["refresh=0", "refresh=x", "refresh=", "refresh=1,refresh=2"])
def test_what_is_no_time_to_run_it_again_is_refused(said: str) -> None:
    with pytest.raises(UsageError, match="seconds"):
        read_secret_command(f"KEY=echo {CANARY}@a.example,{said}")


def test_what_the_supervisor_holds_is_not_renewed_by_a_program() -> None:
    with pytest.raises(UsageError, match="taskvm secret put"):
        read_secret_command("KEY=gone@a.example,refresh=600", {"KEY": "carried"})


@pytest.mark.parametrize("read", [read_secret, read_secret_file, read_secret_command])
def test_another_process_has_read_the_values(read: object) -> None:
    """Nothing is read or run again: the file and the command do not exist."""
    text = (
        "TOKEN@a.example,in=query" if read is read_secret else "TOKEN=/nowhere@a.example,in=query"
    )
    assert callable(read)

    secret = read(text, {"TOKEN": "carried"})

    assert (secret.reveal(), secret.places, secret.hosts) == ("carried", ("query",), ("a.example",))


@pytest.mark.parametrize(
    "text",
    [
        f"TOKEN={CANARY}@a.example",
        f"TOKEN@a.example={CANARY}",
        f"TOKEN@a.example,{CANARY}=",
        f"TOKEN@a.example,value={CANARY}",
        f"TOKEN={CANARY}",
    ],
)
def test_a_value_in_the_text_is_refused_and_not_repeated(text: str) -> None:
    """Also one in base64, which may end in an equals sign."""
    with pytest.raises(UsageError, match="does not belong on the command line") as caught:
        read_secret(text)

    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("TOKEN", "it is not NAME@HOST"),
        ("@a.example", "it is not NAME@HOST"),
        ("TOKEN@", "hosts is not a list"),
        ("TOKEN@in=query", "hosts is not a list"),
        ("TOKEN@a.example,in=header", "its places are not among query, path, body"),
        ("TOKEN@a.example,in=", "does not belong on the command line"),
        ("TOKEN@a.example,header=Host", "never sent in Host"),
        ("TOKEN@a.example,shape=ghp_", "at least 16"),
        ("TOKEN@a.example,shape=*{400}", "256 signs at most"),
        ("TOKEN@a.example,shape=*{20},shape=*{30}", "a secret has one shape"),
        ("UNSET_IN_TESTS@a.example", "UNSET_IN_TESTS is not set"),
    ],
)
def test_what_is_wrong_is_said(text: str, cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_secret(text)

    assert cause in str(caught.value)


@pytest.mark.parametrize("text", ["KEY", "KEY=@a.example", "=x@a.example", "KEY= @a.example"])
def test_a_source_is_named(text: str) -> None:
    for read in (read_secret_file, read_secret_command):
        with pytest.raises(UsageError, match="it is not NAME="):
            read(text)


def test_a_command_with_an_open_quote_is_refused() -> None:
    with pytest.raises(UsageError, match="its COMMAND has no closing quotation"):
        read_secret_command("KEY=echo 'x@a.example")
