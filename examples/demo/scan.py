"""An extension of the demonstration: look for the token in the virtual machine itself, from the host, while it runs.

It reads the memory of the QEMU process, which is all of the guest's memory, its kernel and caches included, and the
files that QEMU has open as disks. The guest is not asked. That the search would find something is shown by the
placeholder, which the guest does have, in its memory and on its disk.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from taskfactory.events import ToolCall
from taskfactory.extensions import Hooks

# The agent's last call, and no other, is of this tool.
LAST_TOOL = "ls"
PLACEHOLDER = b"taskvm_secret_API_TOKEN_"
REPORT_VARIABLE = "DEMO_SCAN_REPORT"
_CHUNK = 8 * 1024 * 1024
_LONGEST = 256  # bytes of anything that is looked for


def register(hooks: Hooks) -> None:
    @hooks.on_tool_call
    async def look(call: ToolCall) -> None:
        if call.tool == LAST_TOOL:
            await asyncio.to_thread(_report)


def _report() -> None:
    found = scan(os.environ["DEMO_API_TOKEN"])
    report = {place: asdict(each) for place, each in found.items()}
    Path(os.environ[REPORT_VARIABLE]).write_text(json.dumps(report))


def spellings(token: str) -> tuple[bytes, ...]:
    """Return the token as it is, in base64 and in hexadecimal digits."""
    raw = token.encode()
    return raw, base64.b64encode(raw).rstrip(b"="), raw.hex().encode()


@dataclass(slots=True)
class Scan:
    """How much of a place was searched, and what is in it. `refused`: this user may not read all of it."""

    size_bytes: int = 0
    token: bool = False
    placeholder: bool = False
    refused: str = ""

    def search(self, pieces: Iterable[bytes], wanted: Sequence[bytes]) -> None:
        end = b""
        try:
            for piece in pieces:
                self.size_bytes += len(piece)
                text = end + piece
                self.token |= any(form in text for form in wanted)
                self.placeholder |= PLACEHOLDER in text
                end = piece[-_LONGEST:]  # a word may lie across the border
        except PermissionError as error:
            self.refused = f"{error.filename}: {error.strerror}"


def scan(token: str) -> dict[str, Scan]:
    """Search the memory and the disks of this process's virtual machine."""
    found = {"memory": Scan(), "disk": Scan()}
    for pid in _machines():
        found["memory"].search(_memory(pid), spellings(token))
        found["disk"].search(_disks(pid), spellings(token))
    return found


def _machines() -> Iterator[int]:
    """The QEMU processes below this one."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            head, _, rest = (entry / "stat").read_text().rpartition(")")
            names[pid], parents[pid] = head.partition("(")[2], int(rest.split()[1])
    for pid, name in names.items():
        above = pid
        while above > 1 and above != os.getpid():
            above = parents.get(above, 0)
        if above == os.getpid() and name.startswith("qemu"):
            yield pid


def _memory(pid: int) -> Iterator[bytes]:
    maps = Path(f"/proc/{pid}/maps").read_text()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end, mode in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (\S+)", maps, re.MULTILINE):
            if "r" in mode:
                yield from _region(memory.fileno(), int(start, 16), int(end, 16))


def _region(memory: int, start: int, end: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError, OverflowError):  # pages of the kernel's own; gone since
        while start < end and (piece := os.pread(memory, min(_CHUNK, end - start), start)):
            yield piece
            start += len(piece)


def _disks(pid: int) -> Iterator[bytes]:
    seen = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        name = str(link.readlink())
        if stat.S_ISREG(link.stat().st_mode) and name.endswith(".qcow2") and name not in seen:
            seen.add(name)
            with link.open("rb") as disk:
                while piece := disk.read(_CHUNK):
                    yield piece
