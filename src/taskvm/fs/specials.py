"""FIFOs and sockets that a guest made in a directory of the host. They exist here and nowhere on the host.

The guest's kernel does all that they can do: a name, a type and a mode is what it needs from a file system. On the
host one would be a trap, for a tool that opens a FIFO waits for a writer, so the host never sees them; they end
with the mount. They are kept by the identity of their directory, which outlives the guest's memory of it.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from taskvm.fs.nodes import Identity, identity
from taskvm.fs.provider import DirEntry, refuse
from taskvm.wire.fuse import SetAttr, SetAttrField

MAX_SPECIALS = 4096
# Offsets of readdir that no file system of the host uses: most count from 0, and the hashes of ext4 leave
# 0x7fffffff in their upper half free, except for its own end of a directory.
FIRST_OFFSET = 0x7FFF_FFFF_0000_0000
END_OFFSET = 0x7FFF_FFFF_FFFF_FFFF
_FIRST_INO = 1 << 62  # the host's inode numbers are far smaller
KINDS = (stat.S_IFIFO, stat.S_IFSOCK)
# Of no file system of the host: the kernel gives none the device number 0.
DEVICE = 0


@dataclass(slots=True)
class Special:
    """One FIFO or socket; named like os.stat_result, whose part it plays."""

    st_ino: int
    st_mode: int
    st_uid: int
    st_gid: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_nlink: int = 1
    st_dev: int = DEVICE
    st_birth_ns: int = 0
    st_size: int = 0
    st_blocks: int = 0
    st_blksize: int = 4096

    @property
    def times_ns(self) -> tuple[int, int, int]:
        """Of access, modification and change."""
        return self.st_atime_ns, self.st_mtime_ns, self.st_ctime_ns

    def change(self, changes: SetAttr, mode_mask: int) -> None:
        """Apply what SETATTR asks; a size is EINVAL, as truncate(2) says."""
        if changes.valid & SetAttrField.SIZE:
            raise refuse(errno.EINVAL)
        if changes.valid & SetAttrField.MODE:
            self.st_mode = stat.S_IFMT(self.st_mode) | (changes.mode & mode_mask)
        self.st_ctime_ns = time.time_ns()
        if changes.valid & SetAttrField.ATIME:
            now = changes.valid & SetAttrField.ATIME_NOW
            self.st_atime_ns = self.st_ctime_ns if now else changes.atime_ns
        if changes.valid & SetAttrField.MTIME:
            now = changes.valid & SetAttrField.MTIME_NOW
            self.st_mtime_ns = self.st_ctime_ns if now else changes.mtime_ns


class SpecialState(msgspec.Struct, frozen=True, array_like=True):
    """One as it is saved."""

    directory: Identity
    name: bytes
    ino: int
    mode: int
    times_ns: tuple[int, int, int]


class Specials:
    """All FIFOs and sockets of one mount, by the identity of their directory and their name."""

    def __init__(self) -> None:
        self._named: dict[Identity, dict[bytes, Special]] = {}
        self._by_ino: dict[int, Special] = {}
        self._next_ino = _FIRST_INO

    def get(self, directory: Identity, name: bytes) -> Special | None:
        """Return what `name` is, if it is one of these."""
        if not self._named:
            return None
        return self._named.get(directory, {}).get(name)

    def known(self, node: Identity) -> Special | None:
        """Return the one that a node is, which may have no name any more."""
        return self._by_ino.get(node[1]) if node[0] == DEVICE else None

    def make(self, directory: Identity, name: bytes, mode: int) -> Special:
        """Add a new one. The caller knows that nothing has the name yet."""
        if self.is_full:
            raise refuse(errno.ENOSPC)
        now = time.time_ns()
        special = Special(self._next_ino, mode, os.getuid(), os.getgid(), now, now, now)
        self._next_ino += 1
        self._by_ino[special.st_ino] = special
        self._named.setdefault(directory, {})[name] = special
        return special

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another one."""
        return len(self._by_ino) >= MAX_SPECIALS

    def keep(
        self, is_there: Callable[[Identity], bool], is_known: Callable[[Identity], bool]
    ) -> None:
        """Drop those whose directory is not there any more, as far as they are not known to the guest.

        The host can remove a directory that looks empty to it, and nobody is told of each.
        """
        for directory in [one for one in self._named if not is_there(one)]:
            for special in self._named.pop(directory).values():
                special.st_nlink = 0
        for special in list(self._by_ino.values()):
            if not special.st_nlink and not is_known(identity(special)):
                del self._by_ino[special.st_ino]

    def remove(self, directory: Identity, name: bytes) -> bool:
        """Take the name away, if it is one of these."""
        special = self.get(directory, name)
        if special is None:
            return False
        self._take(directory, name)
        special.st_nlink = 0
        return True

    def move(self, old: Identity, name: bytes, new: Identity, new_name: bytes) -> None:
        """Rename one, over another one if there was one."""
        self.remove(new, new_name)
        self._named.setdefault(new, {})[new_name] = self._take(old, name)

    def forget(self, forgotten: Identity) -> None:
        """Let go of what the guest no longer knows, if it has no name either."""
        special = self.known(forgotten)
        if special is not None and not special.st_nlink:
            del self._by_ino[special.st_ino]

    def within(self, directory: Identity) -> bool:
        """Tell whether the directory has any."""
        return directory in self._named

    def list(self, directory: Identity, offset: int) -> list[DirEntry]:
        """Return those of a directory from `offset` on, in the order they were made, which is for ever."""
        named = sorted(self._named.get(directory, {}).items(), key=lambda item: item[1].st_ino)
        return [
            DirEntry(name, special.st_ino, special.st_mode >> 12, after)
            for name, special in named
            if (after := FIRST_OFFSET + special.st_ino - _FIRST_INO + 1) > offset
        ]

    def export(self) -> Sequence[SpecialState]:
        """Return those that have a name."""
        return [
            SpecialState(directory, name, one.st_ino, one.st_mode, one.times_ns)
            for directory, named in self._named.items()
            for name, one in named.items()
        ]

    def restore(self, states: Sequence[SpecialState], device: int) -> None:
        """Have again, to begin with, what was exported; the host's `device` may have another number by now."""
        for state in states:
            special = Special(state.ino, state.mode, os.getuid(), os.getgid(), *state.times_ns)
            directory = (device, *state.directory[1:])
            self._by_ino[special.st_ino] = special
            self._named.setdefault(directory, {})[state.name] = special
            self._next_ino = max(self._next_ino, special.st_ino + 1)

    def _take(self, directory: Identity, name: bytes) -> Special:
        special = self._named[directory].pop(name)
        if not self._named[directory]:
            del self._named[directory]
        return special
