"""The attributes of a node, for providers that do not have them from the host's kernel."""

from __future__ import annotations

import os
import stat
import time

import msgspec

from taskvm.wire.fuse_replies import Attr

BLOCK = 4096


class Attributes(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Named as os.stat_result names them."""

    st_ino: int
    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_blocks: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_blksize: int

    @classmethod
    def of(cls, attr: Attr, ino: int) -> Attributes:
        """Return the attributes of something else under the inode number `ino`."""
        return cls(
            st_ino=ino,
            st_mode=attr.st_mode,
            st_nlink=attr.st_nlink,
            st_uid=attr.st_uid,
            st_gid=attr.st_gid,
            st_size=attr.st_size,
            st_blocks=attr.st_blocks,
            st_atime_ns=attr.st_atime_ns,
            st_mtime_ns=attr.st_mtime_ns,
            st_ctime_ns=attr.st_ctime_ns,
            st_blksize=attr.st_blksize,
        )

    @classmethod
    def made(cls, ino: int, mode: int, *, size: int = 0, mtime_ns: int | None = None) -> Attributes:
        """Return those of a thing that belongs to the user of this process; its times are `mtime_ns`, or now."""
        now = time.time_ns() if mtime_ns is None else mtime_ns
        return cls(
            st_ino=ino,
            st_mode=mode,
            st_nlink=2 if stat.S_ISDIR(mode) else 1,
            st_uid=os.getuid(),
            st_gid=os.getgid(),
            st_size=size,
            st_blocks=(size + 511) // 512,
            st_blksize=BLOCK,
            st_atime_ns=now,
            st_mtime_ns=now,
            st_ctime_ns=now,
        )
