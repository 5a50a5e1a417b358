"""Which of the host's apt sources serve a Debian suite, read from both formats of sources.list(5). Pure, but for
`read_apt_sources`.

Only Debian's own archive is used: an entry counts when it offers `main` of the suite, of its updates or of its
security updates, and its key is Debian's (or not named, in which case Debian's is demanded). Entries of third parties
are left out, even under the same suite name: what apt trusts for the host is not what a guest should be made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from taskvm.errors import ImageError
from taskvm.image.manifest import ImageSpec

APT_DIRECTORY = Path("/etc/apt")
DEBIAN_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

_ONE_LINE = re.compile(
    r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>[^\s\[]\S*)\s+(?P<suite>\S+)\s+(?P<rest>[^#]+)"
)


@dataclass(frozen=True, slots=True)
class AptSource:
    """One archive, one suite. `signed_by` is the path of a keyring, or empty where apt's own trust applies."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""
    architectures: tuple[str, ...] = ()

    def to_line(self) -> str:
        """Return the one-line form that mmdebstrap takes, limited to main and always with a keyring."""
        return f"deb [signed-by={self.signed_by or DEBIAN_KEYRING}] {self.uri} {self.suite} main"


def choose_sources(spec: ImageSpec, apt_directory: Path = APT_DIRECTORY) -> list[AptSource]:
    """Return the sources to build `spec` from. Raises ImageError when neither it nor the host names one."""
    if spec.mirror is not None:
        return [
            source for url in spec.mirror.split() for source in _mirror_sources(url, spec.suite)
        ]
    chosen = [
        source
        for source in read_apt_sources(apt_directory)
        if _is_debian(source, spec.suite, spec.debian_arch)
    ]
    if not any(source.suite == spec.suite for source in chosen):
        raise ImageError(
            f"find a Debian mirror for {spec.suite}",
            f"no entry in {apt_directory} offers main of {spec.suite} signed by Debian's archive key",
            "Name one: taskvm image build --mirror URL",
        )
    return list(dict.fromkeys(chosen))


def read_apt_sources(apt_directory: Path) -> list[AptSource]:
    """Return every enabled binary source of an apt configuration directory."""
    parts = apt_directory / "sources.list.d"
    one_line = [apt_directory / "sources.list", *sorted(parts.glob("*.list"))]
    sources = [
        source for path in one_line if path.is_file() for source in parse_one_line(_text(path))
    ]
    for path in sorted(parts.glob("*.sources")):
        sources += parse_deb822(_text(path))
    return sources


def parse_one_line(text: str) -> Iterator[AptSource]:
    """Parse the lines `deb [options] uri suite component…`; anything else is no binary source."""
    for line in text.splitlines():
        match = _ONE_LINE.match(line.strip())
        if match is None:
            continue
        pairs = (option.partition("=") for option in (match["options"] or "").split())
        options = {name.lower(): value for name, _, value in pairs}
        yield AptSource(
            uri=match["uri"],
            suite=match["suite"],
            components=tuple(match["rest"].split()),
            signed_by=options.get("signed-by", ""),
            architectures=tuple(filter(None, options.get("arch", "").split(","))),
        )


def parse_deb822(text: str) -> Iterator[AptSource]:
    """Parse stanzas of `Types: deb`; `Enabled: no` and source-only ones are left out."""
    for stanza in re.split(r"\n\s*\n", text):
        fields = _parse_fields(stanza)
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes") == "no":
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield AptSource(
                    uri=uri,
                    suite=suite,
                    components=tuple(fields.get("components", "").split()),
                    signed_by=fields.get("signed-by", ""),
                    architectures=tuple(fields.get("architectures", "").split()),
                )


def render_guest_sources(sources: Iterable[AptSource]) -> str:
    """Return the deb822 file for the guest: the same archives, Debian's key, and no credentials of the host's."""
    stanzas = [
        f"Types: deb\nURIs: {_without_credentials(source.uri)}\nSuites: {source.suite}\n"
        f"Components: main\nSigned-By: {DEBIAN_KEYRING}\n"
        for source in sources
    ]
    return "\n".join(stanzas)


# Judging and making sources...


def _is_debian(source: AptSource, suite: str, debian_arch: str) -> bool:
    return (
        source.suite in (suite, f"{suite}-updates", f"{suite}-security")
        and "main" in source.components
        and (not source.architectures or debian_arch in source.architectures)
        and (not source.signed_by or Path(source.signed_by).name.startswith("debian-archive-"))
        and not source.uri.startswith("cdrom:")
    )


def _mirror_sources(url: str, suite: str) -> list[AptSource]:
    suites = (
        [f"{suite}-security"] if "security" in urlsplit(url).path else [suite, f"{suite}-updates"]
    )
    return [AptSource(url, each, ("main",)) for each in suites]


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _parse_fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
