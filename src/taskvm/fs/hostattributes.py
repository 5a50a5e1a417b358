"""How the attributes that a guest asks for come to a file of the host. All by descriptor, O_PATH ones too.

Rule 1: set-user-id and set-group-id are never set; the owner stays as it is.
Rule 2: the guest's umask has been applied by the guest's kernel. Ours must not narrow a mode once more.
"""

from __future__ import annotations

import errno
import os
import stat

from taskvm.fs import syscalls
from taskvm.fs.hosttree import through_proc
from taskvm.fs.provider import refuse
from taskvm.wire.fuse import SetAttr, SetAttrField
from taskvm.wire.fuse_replies import Attr

MODE = 0o1777  # what a guest may set: rule 1


def read_umask() -> int:
    """Return this process's umask."""
    # os.umask() can only be asked by setting it, for all threads: /proc tells without (Linux 4.7).
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o077


class Umask:
    """This process's umask as it was when it was last looked at: the program may change it at any time."""

    def __init__(self) -> None:
        self._known = read_umask()

    def undo(self, fd: int, mode: int) -> bool:
        """Give a new file the `mode` that was asked for, if the umask has taken bits of it. Tell if it changed."""
        asked = mode & MODE
        has = stat.S_IMODE(os.fstat(fd).st_mode)
        if has & MODE == asked:
            return False
        if has & MODE != asked & ~self._known:
            self._known = read_umask()
        if has & MODE != asked & ~self._known:
            return False  # anything else (a default ACL) is the host's wish and stays
        os.chmod(through_proc(fd), asked | (has & stat.S_ISGID))  # noqa: PTH101 - a descriptor
        return True


def refuse_chown(attr: Attr, changes: SetAttr) -> None:
    """Refuse another owner than the one that `attr` has."""
    if changes.valid & SetAttrField.UID and changes.uid != attr.st_uid:
        raise refuse(errno.EPERM)
    if changes.valid & SetAttrField.GID and changes.gid != attr.st_gid:
        raise refuse(errno.EPERM)


def set_mode_and_times(fd: int, kind: int, changes: SetAttr) -> None:
    """Change the permissions and the times that `changes.valid` names, of a thing of the type `kind`."""
    valid = changes.valid
    if valid & SetAttrField.MODE:
        _refuse_mode(kind)
        os.chmod(through_proc(fd), changes.mode & MODE)  # noqa: PTH101 - a descriptor
    atime = _time(valid, SetAttrField.ATIME, SetAttrField.ATIME_NOW, changes.atime_ns)
    mtime = _time(valid, SetAttrField.MTIME, SetAttrField.MTIME_NOW, changes.mtime_ns)
    if (atime, mtime) != (syscalls.OMIT, syscalls.OMIT):
        syscalls.set_times(fd, atime, mtime)


def _refuse_mode(kind: int) -> None:
    # A socket, FIFO or device here is the host's: who else may connect to it is not the guest's to say.
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise refuse(errno.EOPNOTSUPP if kind == stat.S_IFLNK else errno.EPERM)


def _time(valid: int, given: SetAttrField, now: SetAttrField, value_ns: int) -> tuple[int, int]:
    if valid & now:
        return syscalls.NOW
    if valid & given:
        return divmod(value_ns, 1_000_000_000)
    return syscalls.OMIT
