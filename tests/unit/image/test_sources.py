"""taskvm.image.sources: of a host's apt sources, Debian's own and nothing else."""

from pathlib import Path

import pytest

from taskvm.errors import ImageError
from taskvm.image.manifest import ImageSpec
from taskvm.image.sources import (
    DEBIAN_KEYRING,
    AptSource,
    choose_sources,
    parse_deb822,
    parse_one_line,
    render_guest_sources,
)

SPEC = ImageSpec(suite="bookworm", arch="x86_64")

DEB822 = f"""\
# the distribution
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: {DEBIAN_KEYRING}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: {DEBIAN_KEYRING}

Types: deb
Enabled: no
URIs: http://disabled.example/debian
Suites: bookworm
Components: main
"""

THIRD_PARTIES = """\
deb [arch=amd64 signed-by=/etc/apt/keyrings/docker.gpg] http://third.example/debian bookworm main
deb [signed-by=/usr/share/keyrings/pgdg.gpg] http://third.example/apt bookworm-pgdg main
deb [arch=arm64] http://other-architecture.example/debian bookworm main
deb cdrom:[Debian]/ bookworm main
deb-src http://source.example/debian bookworm main
# deb http://comment.example/debian bookworm main
"""


@pytest.fixture
def apt(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(THIRD_PARTIES)
    return tmp_path


def test_debians_suite_updates_and_security_are_chosen_and_third_parties_are_not(apt: Path) -> None:
    (apt / "sources.list.d" / "debian.sources").write_text(DEB822)

    chosen = choose_sources(SPEC, apt)

    assert [(source.uri, source.suite) for source in chosen] == [
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://mirror.example/debian-security", "bookworm-security"),
    ]


def test_one_line_entries_serve_as_well(apt: Path) -> None:
    options = "[ signed-by=/usr/share/keyrings/debian-archive-bookworm-stable.gpg ]"
    line = f"deb\t{options}  http://m.example/d bookworm  main non-free # ours\n"
    (apt / "sources.list.d" / "debian.list").write_text(line)

    chosen = choose_sources(SPEC, apt)

    assert chosen == [
        AptSource(
            "http://m.example/d",
            "bookworm",
            ("main", "non-free"),
            "/usr/share/keyrings/debian-archive-bookworm-stable.gpg",
        )
    ]


def test_a_source_without_a_key_is_held_to_debians_key() -> None:
    source = AptSource("http://m.example/d", "bookworm", ("main",))

    assert source.to_line() == f"deb [signed-by={DEBIAN_KEYRING}] http://m.example/d bookworm main"


def test_a_host_that_is_not_debian_is_told_to_name_a_mirror(apt: Path) -> None:
    with pytest.raises(ImageError, match="--mirror"):
        choose_sources(SPEC, apt)


def test_another_suite_of_the_host_does_not_serve(apt: Path) -> None:
    (apt / "sources.list.d" / "debian.sources").write_text(DEB822.replace("bookworm", "trixie"))

    with pytest.raises(ImageError, match="bookworm"):
        choose_sources(SPEC, apt)


def test_a_named_mirror_replaces_the_hosts_sources(apt: Path) -> None:
    (apt / "sources.list.d" / "debian.sources").write_text(DEB822)
    spec = ImageSpec(
        suite="trixie", mirror="http://a.example/debian http://a.example/debian-security"
    )

    chosen = choose_sources(spec, apt)

    assert [(source.uri, source.suite) for source in chosen] == [
        ("http://a.example/debian", "trixie"),
        ("http://a.example/debian", "trixie-updates"),
        ("http://a.example/debian-security", "trixie-security"),
    ]


def test_the_guest_gets_the_archive_but_not_the_hosts_password_for_it() -> None:
    source = AptSource("http://user:password@m.example:8080/debian", "bookworm", ("main",))

    text = render_guest_sources([source])

    assert "password" not in text
    assert [each.uri for each in parse_deb822(text)] == ["http://m.example:8080/debian"]


def test_an_embedded_key_is_not_debians(apt: Path) -> None:
    embedded = DEB822.replace(DEBIAN_KEYRING, "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQ=")
    (apt / "sources.list.d" / "other.sources").write_text(embedded)

    with pytest.raises(ImageError):
        choose_sources(SPEC, apt)


@pytest.mark.parametrize("text", ["", "deb", "deb [", "deb [signed-by=x http://a b", "\n\n:\n:: x"])
def test_broken_entries_are_no_sources(text: str) -> None:
    assert [*parse_one_line(text), *parse_deb822(text)] == []
