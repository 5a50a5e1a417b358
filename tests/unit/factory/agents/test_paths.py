"""taskfactory.agents.paths: what a path means where the tools act."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskfactory.agents.paths import PathMap

PATHS = PathMap(
    host_roots=("/home/me/link/app", "/home/me/app"), root="/workspace", home="/home/user"
)


@pytest.mark.parametrize(
    ("given_path", "meant"),
    [
        ("src/a.py", "/workspace/src/a.py"),
        (".", "/workspace"),
        ("", "/workspace"),
        ("@src/a.py", "/workspace/src/a.py"),
        ("/home/me/app", "/workspace"),
        ("/home/me/app/src/a.py", "/workspace/src/a.py"),
        ("/home/me/link/app/x", "/workspace/x"),
        ("/home/me/app/../other/x", "/home/me/other/x"),
        ("/home/me/app-old/x", "/home/me/app-old/x"),
        ("//home/me/app/x", "/workspace/x"),
        ("/etc/hostname", "/etc/hostname"),
        ("../etc/passwd", "/etc/passwd"),
        ("~", "/home/user"),
        ("~/x", "/home/user/x"),
        ("~root/x", "/workspace/~root/x"),
        ("a\u00a0b\u202fc", "/workspace/a b c"),
        ("/workspace/a/./b//c", "/workspace/a/b/c"),
    ],
)
def test_an_argument_means_a_path_of_the_place(given_path: str, meant: str) -> None:
    assert PATHS.resolve(given_path) == meant


# A workspace that lies on the host where a guest has its own: /workspace/src holds src/main.py.
BELOW = PathMap(host_roots=("/workspace/src",), root="/workspace", home="/root")


@pytest.mark.parametrize(
    ("given_path", "meant"),
    [
        ("src/main.py", "/workspace/src/main.py"),
        ("/workspace/src/main.py", "/workspace/src/main.py"),
        ("/workspace/main.py", "/workspace/main.py"),
    ],
)
def test_what_lies_under_the_guests_root_is_the_guests(given_path: str, meant: str) -> None:
    assert BELOW.resolve(given_path) == meant
    assert BELOW.map_text(f"cat {given_path}") == f"cat {given_path}"


def test_only_an_absolute_argument_may_be_the_hosts() -> None:
    """The guest's home is not the host's, though both are called so."""
    paths = PathMap(host_roots=("/root/app", "/home"), root="/workspace", home="/root")

    assert paths.resolve("~/app/x") == "/root/app/x"
    assert paths.resolve("../home/x") == "/home/x"
    assert paths.resolve("/root/app/x") == "/workspace/x"


def test_a_nul_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        PATHS.resolve("a\0b")


@given(st.text(alphabet="abh/.~@ omeapp", max_size=40))
def test_a_meant_path_is_absolute_and_normal(text: str) -> None:
    path = PATHS.resolve(text)

    assert path.startswith("/")
    assert ".." not in path.split("/")
    assert not (text.removeprefix("@").startswith("/") and path.startswith("/home/me/app/"))


@pytest.mark.parametrize(
    ("text", "mapped"),
    [
        ("cd /home/me/app && ls", "cd /workspace && ls"),
        ("cat /home/me/app/src/a.py", "cat /workspace/src/a.py"),
        ("see /home/me/app.", "see /workspace."),
        ("'/home/me/app'; \"/home/me/app/x\"", "'/workspace'; \"/workspace/x\""),
        ("--dir=/home/me/app:/home/me/app/b", "--dir=/workspace:/workspace/b"),
        (
            "/home/me/app-old /home/me/app.bak /home/me/apple",
            "/home/me/app-old /home/me/app.bak /home/me/apple",
        ),
        ("/mnt/home/me/app ./home/me/app", "/mnt/home/me/app ./home/me/app"),
        ("/home/me/link/app/x", "/workspace/x"),
    ],
)
def test_free_text_is_mapped_token_by_token(text: str, mapped: str) -> None:
    assert PATHS.map_text(text) == mapped


def test_on_the_host_text_stays_as_it_is() -> None:
    paths = PathMap(host_roots=("/home/me/app",), root="/home/me/app", home="/home/me")

    assert paths.map_text("ls /home/me/app") == "ls /home/me/app"
    assert paths.resolve("~/app/x") == "/home/me/app/x"
    assert paths.show("/home/me/app/x") == "x"
