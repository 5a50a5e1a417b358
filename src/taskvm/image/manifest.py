"""What an image is made from (`ImageSpec`), what it turned out to be (`Manifest`), and the image itself (`Image`).

Rule 1: an image is immutable and named by the digest of its assets.
Rule 2: the digest covers what a guest can see (its archive's address too), not when or by whom it was built.
"""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from taskvm.errors import UsageError

MANIFEST_FORMAT = 1
# Raised when the same ImageSpec gives a different guest, such as by another kernel module: what an older recipe made
# is then built anew.
RECIPE = 3
# Begins the names that the store gives to what it has built for a specification other than the default.
SPEC_PREFIX = "spec-"
DEFAULT_SUITE = "bookworm"
DEFAULT_SIZE_MIB = 4096  # virtual: the file is sparse, and each sandbox writes to its own overlay

# The kernel's name of an architecture, as in the agent's file name, and Debian's.
DEBIAN_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

_SUITE = re.compile(r"[a-z][a-z0-9-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")  # Debian Policy 5.6.1
_MIRROR = re.compile(r"(https?|file|copy|ftp)://?[^\s@\[\]\"']+")


def host_architecture() -> str:
    """Return this machine's architecture by the kernel's name."""
    return platform.machine()


class ImageSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to build. Raises UsageError for a name that cannot be one.

    `mirror` is None for the host's own apt sources, or the URLs of Debian archives separated by spaces: one whose
    path holds "security" serves the suite's security updates, any other the suite and its updates.
    """

    suite: str = DEFAULT_SUITE
    mirror: str | None = None
    include: tuple[str, ...] = ()
    arch: str = msgspec.field(default_factory=host_architecture)
    size_mib: int = DEFAULT_SIZE_MIB

    def __post_init__(self) -> None:
        if not _SUITE.fullmatch(self.suite):
            raise _bad_spec(f"{self.suite!r} is not the name of a Debian suite")
        if self.arch not in DEBIAN_ARCHITECTURES:
            raise _bad_spec(
                f"architecture {self.arch!r} is none of {', '.join(DEBIAN_ARCHITECTURES)}"
            )
        for package in self.include:
            if not _PACKAGE.fullmatch(package):
                raise _bad_spec(f"{package!r} is not the name of a Debian package")
        for url in (self.mirror or "").split():
            if not _MIRROR.fullmatch(url):
                raise _bad_spec(f"mirror {url!r} is not a plain URL without credentials")
        if not 512 <= self.size_mib <= 1024 * 1024:
            raise _bad_spec(f"a disk of {self.size_mib} MiB is outside 512 MiB to 1 TiB")

    @property
    def debian_arch(self) -> str:
        """Debian's name of the architecture."""
        return DEBIAN_ARCHITECTURES[self.arch]

    @property
    def ref_name(self) -> str:
        """The name under which the store remembers what this specification was built into."""
        if self == ImageSpec():
            return "default"
        return f"{SPEC_PREFIX}{hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]}"


class Asset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of an image."""

    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file manifest.json of an image. `assets` maps paths relative to the image's directory."""

    format: int
    recipe: int
    digest: str
    arch: str
    created: str
    spec: ImageSpec
    kernel_release: str
    packages: dict[str, str]
    assets: dict[str, Asset]

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()


def compute_digest(arch: str, kernel_release: str, assets: dict[str, Asset]) -> str:
    """Return the digest that names an image with these assets."""
    parts = (MANIFEST_FORMAT, arch, kernel_release, sorted(assets.items()))
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


@dataclass(frozen=True, slots=True)
class Image:
    """A finished image in a store: kernel, modules and root file system."""

    path: Path
    manifest: Manifest = field(hash=False)  # it holds maps; the path ends in the digest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def kernel(self) -> Path:
        return self.path / "vmlinuz"

    @property
    def rootfs(self) -> Path:
        return self.path / "rootfs.ext4"

    @property
    def disk_bytes(self) -> int:
        """What the image takes on the host's disk; its root file system is sparse."""
        return sum((self.path / name).stat().st_blocks * 512 for name in self.manifest.assets)

    @property
    def modules(self) -> tuple[Path, ...]:
        """The kernel modules, in the order in which they must be loaded."""
        names = sorted(name for name in self.manifest.assets if name.startswith("modules/"))
        return tuple(self.path / name for name in names)


def _bad_spec(cause: str) -> UsageError:
    return UsageError("describe a guest image", cause)
