"""What is the same for every provider whose nodes are each served by one of several others."""

from __future__ import annotations

import errno
from abc import abstractmethod
from typing import NamedTuple

from taskvm.fs.provider import Node, Provider, refuse
from taskvm.wire.fuse_replies import StatFs


class Target(NamedTuple):
    """A node of one of several providers, the one with this number."""

    number: int
    provider: Provider
    node: Node


class Divided(Provider):
    """Passes on what concerns a node alone; names, attributes and numbers are the subclass's."""

    @abstractmethod
    def _target(self, node: Node) -> Target:
        """Return what serves a node. Raises OSError: ESTALE for one that was not given out."""

    def _changed(self, node: Node) -> Target:
        """Return what serves a node that is about to change."""
        return self._target(node)

    def readlink(self, node: Node) -> bytes:
        target = self._target(node)
        return target.provider.readlink(target.node)

    def statfs(self, node: Node) -> StatFs:
        target = self._target(node)
        return target.provider.statfs(target.node)

    # Extended attributes.

    def getxattr(self, node: Node, name: bytes) -> bytes:
        target = _with_xattrs(self._target(node))
        return target.provider.getxattr(target.node, name)

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        target = _with_xattrs(self._changed(node))
        target.provider.setxattr(target.node, name, value, flags)

    def listxattr(self, node: Node) -> list[bytes]:
        target = _with_xattrs(self._target(node))
        return target.provider.listxattr(target.node)

    def removexattr(self, node: Node, name: bytes) -> None:
        target = _with_xattrs(self._changed(node))
        target.provider.removexattr(target.node, name)

    # Contents.

    def read(self, node: Node, offset: int, size: int) -> bytes:
        target = self._target(node)
        return target.provider.read(target.node, offset, size)

    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        target = self._changed(node)
        return target.provider.write(target.node, offset, data, append=append)

    def fsync(self, node: Node, *, data_only: bool) -> None:
        target = self._target(node)
        target.provider.fsync(target.node, data_only=data_only)

    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        target = self._changed(node)
        target.provider.allocate(target.node, offset, length, mode)

    def seek(self, node: Node, offset: int, whence: int) -> int:
        target = self._target(node)
        return target.provider.seek(target.node, offset, whence)

    def copy_range(
        self, node: Node, offset: int, target: Node, target_offset: int, length: int
    ) -> int:
        source, into = self._target(node), self._changed(target)
        refuse_crossing(source, into)
        return source.provider.copy_range(source.node, offset, into.node, target_offset, length)


def refuse_crossing(source: Target, target: Target) -> None:
    """Raises OSError (EXDEV) unless both are of one provider."""
    if source.number != target.number:
        raise refuse(errno.EXDEV)


def _with_xattrs(target: Target) -> Target:
    if not target.provider.xattrs:
        raise refuse(errno.EOPNOTSUPP)
    return target
