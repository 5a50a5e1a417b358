"""The root file system: a tar file of Debian's turned into a sparse, reproducible ext4 image.

Every sandbox writes to an overlay of its own, so the file system is made for speed under emulation and for being
thrown away: no journal (a crash loses the sandbox anyway), no metadata checksums (a CRC of every block is emulated
instructions), and all tables initialised now, so that no kernel thread does it in every guest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from taskvm.errors import ImageError
from taskvm.image.debian import SOURCE_DATE_EPOCH
from taskvm.image.tools import require_tool, run_tool

# Fixed, because two builds of the same packages must give the same bytes; guests never see two of them at once.
_UUID = "7461736b-766d-4000-8000-726f6f746673"

# "none" first: what /etc/mke2fs.conf of this host adds would differ from host to host.
_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,"
    "uninit_bg,resize_inode"
)
_BYTES_PER_INODE = 16384
_INODES = re.compile(r"^(Inode count|Free inodes): +(\d+)$", re.MULTILINE)
_ROOM_BYTES = 512 * 1024 * 1024  # least free space in a guest, whatever `size_mib` says

# One shell, because fakeroot remembers owners only as long as it runs. The tar file has no /dev (its device nodes are
# nothing a user may extract), the guest needs a mount point there.
_EXTRACT_AND_FORMAT = """set -eu
mkdir "$2"
tar --extract --numeric-owner --preserve-permissions --delay-directory-restore --file="$1" --directory="$2"
mkdir -p "$2/dev"
touch --date="@$E2FSPROGS_FAKE_TIME" "$2/dev" "$2"
shift
tree=$1
shift
exec "$@" -d "$tree" "$TASKVM_IMAGE" "$TASKVM_BLOCKS"
"""


def build_rootfs(tar: Path, scratch: Path, image: Path, size_mib: int) -> dict[str, str]:
    """Write the ext4 `image` with the contents of `tar`; return the version of each Debian package in it."""
    tree = scratch / "tree"
    size = max(size_mib * 1024 * 1024, tar.stat().st_size + _ROOM_BYTES)
    environment = {
        "E2FSPROGS_FAKE_TIME": str(SOURCE_DATE_EPOCH),
        "MKE2FS_CONFIG": os.devnull,
        "TASKVM_IMAGE": str(image),
        "TASKVM_BLOCKS": str(size // 4096),
    }
    mke2fs = [require_tool("mke2fs", "e2fsprogs"), *mke2fs_options()]
    argv = ["sh", "-c", _EXTRACT_AND_FORMAT, "sh", str(tar), str(tree), *mke2fs]
    if os.geteuid() != 0:
        argv = [require_tool("fakeroot", "fakeroot"), "--", *argv]
    run_tool("make the root file system", argv, environment)
    _settle_times(image, scratch / "times", environment)
    return _package_versions(tree)


def mke2fs_options() -> list[str]:
    """Return the options of mke2fs that do not depend on the contents."""
    return [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-I",
        "256",
        "-i",
        str(_BYTES_PER_INODE),
        "-m",
        "0",  # nobody but root uses it: no reserve
        "-L",
        "taskvm",
        "-U",
        _UUID,
        "-O",
        _FEATURES,
        "-E",
        f"hash_seed={_UUID},lazy_itable_init=0,root_owner=0:0",
    ]


def _settle_times(image: Path, script: Path, environment: Mapping[str, str]) -> None:
    # mke2fs -d copies each file's ctime and atime, which are those of the extraction a moment ago.
    header = run_tool("read the file system's header", ["dumpe2fs", "-h", str(image)])
    numbers = {name: int(value) for name, value in _INODES.findall(header)}
    in_use = (
        numbers["Inode count"] - numbers["Free inodes"]
    )  # a new file system uses the first ones
    script.write_text(
        "".join(
            f"set_inode_field <{inode}> {field} @{SOURCE_DATE_EPOCH}\n"
            for inode in range(1, in_use + 1)
            for field in ("atime", "ctime")
        )
    )
    run_tool(
        "settle the times of files", ["debugfs", "-w", "-f", str(script), str(image)], environment
    )


def _package_versions(tree: Path) -> dict[str, str]:
    listing = run_tool(
        "list the packages of the image",
        [
            "dpkg-query",
            f"--admindir={tree}/var/lib/dpkg",
            "--show",
            "--showformat=${Package} ${Version}\\n",
        ],
    )
    versions = dict(line.split(" ", 1) for line in listing.splitlines())
    if "libc6" not in versions:
        raise ImageError(
            "list the packages of the image", "it holds no libc6: the build is incomplete"
        )
    return versions
