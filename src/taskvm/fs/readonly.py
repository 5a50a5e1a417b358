"""A provider whose contents can be read and never changed through it, whatever the inner one would allow."""

from __future__ import annotations

import errno
from typing import Never

from taskvm.fs.provider import refuse
from taskvm.fs.wrapper import Wrapper


class ReadOnly(Wrapper):
    """Serves `inner` and refuses every change with EROFS."""

    @property
    def prompt(self) -> bool:  # type: ignore[override]  # as in the base class
        return self.inner.prompt

    @property
    def readonly(self) -> bool:  # type: ignore[override]  # as in the base class
        return True

    def _refuse(self, *_arguments: object, **_options: object) -> Never:
        """Refuse a change: who asks `readonly` first never comes here, but a Router of several may not ask."""
        raise refuse(errno.EROFS)

    create = mknod = mkdir = symlink = link = unlink = rmdir = rename = _refuse
    setattr = setxattr = removexattr = write = allocate = copy_range = _refuse
