"""A Debian root file system, as a tar file, and the kernel's package, both through one run of mmdebstrap.

apt checks every signature and hash, with Debian's keyring; what it fetches comes from the sources that
`taskvm.image.sources` chose, through the proxy and with the options that the host's own apt uses. Nothing of the host's
configuration stays in the guest (customize.sh).
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from shlex import quote

from taskvm.errors import ImageError
from taskvm.image.manifest import ImageSpec
from taskvm.image.sources import choose_sources, render_guest_sources
from taskvm.image.tools import require_tool, run_tool
from taskvm.interruption import check

BASE_PACKAGES = (
    "bash",
    "ca-certificates",
    "coreutils",
    "curl",
    "file",
    "git",
    "less",
    "mount",
    "procps",
    "python3",
    "ripgrep",
)

# Every time in the image that the build itself would set (2024-01-01 UTC): a constant, so that a build of the same
# packages gives the same bytes.
SOURCE_DATE_EPOCH = 1704067200

# Documentation is a quarter of the files; licences stay, and so do the manual's directories: openjdk and postgresql
# link into /usr/share/man/man1 when they set themselves up, and fail without it.
_DPKG_OPTIONS = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
)

# Settings of the host's apt that say how its own indexes are kept, not how to reach a mirror; and those that would let
# an unsigned archive pass, whatever the host itself puts up with.
_LOCAL_APT_OPTIONS = re.compile(
    r"Acquire(::(Allow|IndexTargets|Changelogs|cdrom|CompressionTypes|GzipIndexes|Languages).*)? ",
    re.IGNORECASE,
)

_PROGRESS_INTERVAL_S = 0.2

# A step of mmdebstrap's that a person wants to know of.
_STEP = re.compile(
    r"I: ((?!chroot arch|finding|reading|running special|using|skipping|done|removing).+)"
)

# The metapackage's dependency is the kernel itself. apt-get verifies what it downloads here as everywhere.
_FETCH_KERNEL = """set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
kernel=$(apt-cache --no-recommends depends "linux-image-cloud-$TASKVM_DEBIAN_ARCH" |
    sed -n 's/^ *Depends: \\(linux-image-[0-9].*\\)$/\\1/p' | head -n 1)
test -n "$kernel"
cd "$1"
apt-get download "$kernel"
mv linux-image-*.deb taskvm-kernel.deb
"""


def build_debian(spec: ImageSpec, directory: Path, progress: Callable[[str], None]) -> None:
    """Write root.tar and kernel.deb into `directory`. Raises ImageError with what apt or dpkg complained about."""
    program = require_tool("mmdebstrap", "mmdebstrap")
    mode = choose_mode()
    sources = choose_sources(spec)
    for source in sources:
        progress(f"using {source.suite} from {source.uri.rpartition('@')[2]}")
    argv = [*mount_namespace(mode), program]
    argv += [*mmdebstrap_options(spec, mode, directory, host_apt_options()), spec.suite]
    environment = {
        "TASKVM_DEBIAN_ARCH": spec.debian_arch,
        "TASKVM_GUEST_SOURCES": render_guest_sources(sources),
        "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH),
        "LC_ALL": "C.UTF-8",
    }
    lines = "".join(f"{source.to_line()}\n" for source in sources)
    _run_mmdebstrap(argv, environment, lines.encode(), directory, progress)


def choose_mode() -> str:
    """Return mmdebstrap's mode for this user. Raises ImageError when an ordinary user lacks subordinate ids."""
    if os.geteuid() == 0:
        return "root"
    require_tool("newuidmap", "uidmap")
    return "unshare"


def mount_namespace(mode: str) -> list[str]:
    """Return the command that gives mmdebstrap mounts of its own; in unshare mode it sees to that itself.

    As root it binds the host's /dev/shm and mounts /proc and /sys below /tmp. Killed, it would leave them there for
    whoever cleans up /tmp to delete through; in a namespace they end with its last process.
    """
    if mode != "root":
        return []
    return [require_tool("unshare", "util-linux"), "--mount", "--propagation", "private", "--"]


def mmdebstrap_options(
    spec: ImageSpec, mode: str, directory: Path, apt_options: Iterable[str]
) -> list[str]:
    """Return the options of mmdebstrap, each with its reason."""
    packages = sorted({*BASE_PACKAGES, *spec.include})
    # The hooks are passed as text, not as files: in unshare mode they run as a user who cannot enter a private home.
    customize = Path(__file__).with_name("customize.sh").read_text(encoding="utf-8")
    return [
        f"--mode={mode}",
        "--variant=apt",  # the essential packages and apt
        "--format=tar",
        f"--architectures={spec.debian_arch}",
        f"--include={','.join(packages)}",
        "--verbose",  # apt's own lines, from which progress is read
        "--skip=output/dev",  # the agent mounts devtmpfs there
        *(f"--aptopt={option}" for option in apt_options),
        *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS),
        f"--customize-hook={_FETCH_KERNEL}",
        f"--customize-hook=download /taskvm-kernel.deb {quote(str(directory / 'kernel.deb'))}",
        f"--customize-hook={customize}",
    ]


def host_apt_options() -> list[str]:
    """Return the host's settings for reaching archives: proxies, retries, validity of dates, transports."""
    dump = run_tool("read the host's apt configuration", ["apt-config", "dump", "Acquire"])
    return [
        line.removesuffix(";") for line in dump.splitlines() if not _LOCAL_APT_OPTIONS.match(line)
    ]


# Running it, and saying how far it is...


def _run_mmdebstrap(
    argv: list[str],
    environment: dict[str, str],
    sources: bytes,
    directory: Path,
    progress: Callable[[str], None],
) -> None:
    log = directory / "mmdebstrap.log"
    # The messages go to a file, not a pipe: if this process is killed, mmdebstrap must live on to remove its own
    # directory in /tmp. The sources go through standard input: a password in one is nothing for the process list.
    with (
        (directory / "root.tar").open("wb") as tar,
        log.open("wb") as messages,
        subprocess.Popen(
            [*argv, "-", "-"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=tar,
            stderr=messages,
        ) as process,
    ):
        try:
            assert process.stdin is not None
            process.stdin.write(sources)
            process.stdin.close()
            _follow(log, process, AptMeter(progress))
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        complaint = _complaint(log)
        raise ImageError(
            "build the Debian root file system",
            f"mmdebstrap ended with {process.returncode}: {complaint}",
            "Look at the names of the packages: the suite has none that is called so"
            if "E: Unable to locate package" in complaint
            else "Check the mirror and the network, or name another mirror: taskvm image build --mirror URL",
        )


def _follow(log: Path, process: subprocess.Popen[bytes], meter: AptMeter) -> None:
    rest = b""
    with log.open("rb") as messages:
        ended = False
        while not ended:
            check()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PROGRESS_INTERVAL_S)
                ended = True
            *lines, rest = (rest + messages.read()).split(b"\n")
            for line in lines:
                meter.feed(line.decode(errors="replace"))


def _complaint(log: Path) -> str:
    # What went wrong stands just above mmdebstrap's own first "E:", which only says that something did.
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line and not line.startswith("I: ")]
    first = next((n for n, line in enumerate(lines) if line.startswith("E: ")), len(lines))
    return " | ".join(lines[max(0, first - 5) : first + 1]) or "no message"


class AptMeter:
    """Turns the verbose output of mmdebstrap into a few lines a person wants to read."""

    STEP = 20  # packages between two lines

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._total = 0
        self._done = {"fetched": 0, "set up": 0}

    def feed(self, line: str) -> None:
        """Take one line of output."""
        if line.startswith("I: running --customize-hook"):
            self._progress("setting the guest up")
        elif match := _STEP.match(line):
            self._progress(match[1].rstrip("."))
        elif match := re.search(r"(\d+) newly installed", line):
            self._total = int(match[1])
            self._done = dict.fromkeys(self._done, 0)
        elif match := re.match(r"Need to get ([\d.,]+ \w+)", line):
            self._progress(f"fetching {self._total} packages, {match[1]}")
        elif line.startswith("Get:"):
            self._count("fetched")
        elif line.startswith("Setting up "):
            self._count("set up")

    def _count(self, what: str) -> None:
        self._done[what] += 1
        if self._total and self._done[what] % self.STEP == 0:
            self._progress(f"{self._done[what]} of {self._total} packages {what}")
