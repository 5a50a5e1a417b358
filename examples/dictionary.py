"""Serves a dictionary as a directory of files: a provider of one's own, here with coroutines."""

import asyncio
import errno
from collections.abc import Iterable

from taskvm import PathProvider, PathStat, Sandbox


class Dictionary(PathProvider):
    """The keys of `store` are the names, and the values the contents."""

    def __init__(self, store: dict[str, bytes]) -> None:
        self.store = store

    async def stat(self, path: str) -> PathStat:
        if path == "/":
            return PathStat(directory=True)
        if path[1:] not in self.store:
            raise FileNotFoundError(path)
        return PathStat(size=len(self.store[path[1:]]))

    async def list(self, path: str) -> Iterable[str]:
        return self.store

    async def read_file(self, path: str, offset: int, size: int) -> bytes:
        return self.store[path[1:]][offset : offset + size]

    async def write_file(self, path: str, offset: int, data: bytes) -> None:
        old = self.store[path[1:]]
        self.store[path[1:]] = old[:offset] + data + old[offset + len(data) :]

    async def make(self, path: str, *, directory: bool) -> None:
        if directory:
            raise PermissionError(errno.EPERM, "a dictionary has no directories")
        self.store[path[1:]] = b""

    async def resize(self, path: str, size: int) -> None:
        self.store[path[1:]] = self.store[path[1:]][:size].ljust(size, b"\0")

    async def remove(self, path: str, *, directory: bool) -> None:
        del self.store[path[1:]]


async def main() -> None:
    store = {"greeting": b"hello\n"}
    async with Sandbox.create(mounts={"/data": Dictionary(store)}) as vm:
        await vm.exec("cat /data/greeting; tr a-z A-Z < /data/greeting > /data/loud")
    print(store)


if __name__ == "__main__":
    asyncio.run(main())
