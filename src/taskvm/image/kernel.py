"""A kernel package of Debian's, reduced to what a guest loads: vmlinuz and some modules in load order.

The package holds no modules.dep (depmod writes that at installation), so the order comes from where depmod takes
it: the `depends=` string in each module's .modinfo section. Compressed modules are stored decompressed, because the
agent hands them to init_module(2) as they are.
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from taskvm.errors import ImageError
from taskvm.image.tools import require_tool, run_tool

# In the order of loading where the modules themselves do not say: virtio_ring registers what virtio's drivers use,
# and loading virtio first left the console port unbound on 6.1.
GUEST_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "fuse",
    "overlay",
    "libcrc32c",
    "nf_defrag_ipv4",
    "nf_defrag_ipv6",
    "nf_conntrack",
    "nf_nat",
    "nfnetlink",
    "nf_tables",
    "nft_chain_nat",
    "nft_redir",
    "dummy",
    "inet_diag",
    "tcp_diag",  # which exec a connection comes from (guest/origin.c)
)

_MODULE_FILE = re.compile(r"(?P<name>.+)\.ko(?:\.(?P<compression>gz|xz|zst))?")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def unpack_kernel(package: Path, scratch: Path, target: Path) -> str:
    """Put vmlinuz and modules/NN-name.ko of the .deb `package` into `target`; return the kernel's release.

    Raises ImageError when the package has no kernel, or lacks a module that is not built in either.
    """
    run_tool("unpack the kernel package", ["dpkg-deb", "--extract", str(package), str(scratch)])
    kernels = sorted((scratch / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise ImageError(
            f"unpack the kernel package {package.name}", f"it holds {len(kernels)} kernels, not one"
        )
    release = kernels[0].name.removeprefix("vmlinuz-")
    shutil.copyfile(kernels[0], target / "vmlinuz")
    tree = next(path for path in _module_trees(scratch, release) if path.is_dir())
    available = {_module_name(path): path for path in tree.rglob("*.ko*") if _module_name(path)}
    contents: dict[str, bytes] = {}

    def depends(name: str) -> list[str]:
        contents[name] = _read_module(available[name])
        return parse_depends(contents[name])

    built_in = {_module_name(Path(line)) for line in _lines(tree / "modules.builtin")}
    order = load_order((name for name in GUEST_MODULES if name not in built_in), available, depends)
    (target / "modules").mkdir()
    for number, name in enumerate(order):
        (target / "modules" / f"{number:02}-{name}.ko").write_bytes(contents[name])
    return release


def load_order(
    wanted: Iterable[str], available: Mapping[str, object], depends: Callable[[str], list[str]]
) -> list[str]:
    """Return `wanted` and all they depend on, each after its dependencies, otherwise in the given order."""
    order: list[str] = []
    open_names: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        if name not in available or name in open_names:
            cause = (
                "they depend on each other"
                if name in open_names
                else "the package does not hold it"
            )
            raise ImageError(f"order the kernel modules {' <- '.join([*open_names, name])}", cause)
        open_names.append(name)
        for dependency in depends(name):
            visit(dependency)
        open_names.pop()
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def parse_depends(module: bytes) -> list[str]:
    """Return the names in the `depends=` string of a module (an ELF file with a .modinfo section)."""
    match = _DEPENDS.search(module)
    names = match[1].decode("ascii").split(",") if match else []
    return [name.replace("-", "_") for name in names if name]


# Reading modules...


def _module_trees(scratch: Path, release: str) -> list[Path]:
    # Debian 13 moved the modules from /lib to /usr/lib.
    return [scratch / prefix / "modules" / release for prefix in ("lib", "usr/lib")]


def _module_name(path: Path) -> str:
    match = _MODULE_FILE.fullmatch(path.name)
    return match["name"].replace("-", "_") if match else ""


def _read_module(path: Path) -> bytes:
    match path.suffix:
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".zst":
            zstd = require_tool("zstd", "zstd")
            return subprocess.run([zstd, "-dcq", str(path)], check=True, capture_output=True).stdout
        case _:
            return path.read_bytes()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="ascii").split() if path.exists() else []
