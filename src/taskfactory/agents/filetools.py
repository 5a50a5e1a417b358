"""The tools for files: read, write, edit, ls."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath

from taskfactory.agents.cutting import MAX_BYTES, cut_head, size_text, split_lines
from taskfactory.agents.editing import Replacement, apply_edits
from taskfactory.agents.operations import Entry
from taskfactory.agents.tools import Arguments, Tool, ToolContext, ToolOutput
from taskfactory.errors import OperationError, ToolError
from taskfactory.events import Image

MAX_FILE_BYTES = 64 * 1024 * 1024  # a file is held in memory to count its lines
MAX_EDIT_BYTES = 4 * 1024 * 1024  # an edit looks at every character in Python
MAX_IMAGE_BYTES = 5 * 1024 * 1024  # what models accept
MAX_ENTRIES = 500

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)


# read...


class ReadArguments(Arguments, frozen=True):
    path: str
    offset: int | None = None
    limit: int | None = None


async def _read(arguments: ReadArguments, context: ToolContext) -> ToolOutput:
    path = context.resolve(arguments.path)
    data = await _load(path, context, f"read {arguments.path}")
    media_type = _image_type(data)
    if media_type is not None:
        return _image(arguments.path, media_type, data)
    lines = split_lines(data.decode("utf-8", "replace"))
    first = max((arguments.offset or 1) - 1, 0)
    if first and first >= len(lines):
        raise ToolError(f"read {arguments.path}: offset {first + 1} is past its {len(lines)} lines")
    wanted = lines[first:]
    if arguments.limit is not None:
        wanted = wanted[: max(arguments.limit, 1)]
    cut = cut_head("\n".join(wanted))
    if cut.by == "bytes" and cut.lines == 0:
        return ToolOutput(_too_long(arguments.path, first + 1, wanted[0]))
    end = first + min(cut.lines, len(wanted))
    if end >= len(lines):
        return ToolOutput(cut.text)
    reason = f", {size_text(MAX_BYTES)} at most" if cut.by == "bytes" else ""
    note = f"[Lines {first + 1}-{end} of {len(lines)}{reason}. Go on with offset={end + 1}.]"
    return ToolOutput(f"{cut.text}\n\n{note}", {"nextOffset": end + 1, "totalLines": len(lines)})


def _too_long(path: str, number: int, line: str) -> str:
    size = size_text(len(line.encode("utf-8", "replace")))
    return (
        f"[Line {number} of {path} alone has {size}, more than {size_text(MAX_BYTES)}."
        f" Use bash: sed -n '{number}p' FILE | head -c {MAX_BYTES}]"
    )


def _image_type(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _SIGNATURES if data.startswith(start)), None)


def _image(path: str, media_type: str, data: bytes) -> ToolOutput:
    if len(data) > MAX_IMAGE_BYTES:
        size = size_text(len(data))
        raise ToolError(f"read {path}: the image has {size}; make it smaller with bash first")
    return ToolOutput(f"[{media_type}, {size_text(len(data))}]", images=(Image(media_type, data),))


# write...


class WriteArguments(Arguments, frozen=True):
    path: str
    content: str


async def _write(arguments: WriteArguments, context: ToolContext) -> ToolOutput:
    path = context.resolve(arguments.path)
    data = arguments.content.encode("utf-8")
    async with context.locks.hold(path):
        await context.operations.write_bytes(path, data)
    return ToolOutput(f"Wrote {len(data)} bytes to {arguments.path}")


# edit...


class EditItem(Arguments, frozen=True):
    old_text: str
    new_text: str


class EditArguments(Arguments, frozen=True):
    path: str
    edits: tuple[EditItem, ...] = ()
    old_text: str | None = None
    new_text: str | None = None

    def replacements(self) -> list[Replacement]:
        """Return the edits, the older single pair among them."""
        pairs = [Replacement(edit.old_text, edit.new_text) for edit in self.edits]
        if (self.old_text is None) != (self.new_text is None):
            raise ToolError(f"edit {self.path}: oldText and newText go together")
        if self.old_text is not None and self.new_text is not None:
            pairs.append(Replacement(self.old_text, self.new_text))
        return pairs


async def _edit(arguments: EditArguments, context: ToolContext) -> ToolOutput:
    path = context.resolve(arguments.path)
    edits = arguments.replacements()
    async with context.locks.hold(path):
        data = await _load(path, context, f"edit {arguments.path}", MAX_EDIT_BYTES)
        try:
            original = data.decode("utf-8")
        except UnicodeDecodeError as error:
            cause = f"byte {error.start} is not UTF-8 text; use bash"
            raise ToolError(f"edit {arguments.path}: {cause}") from None
        # In a thread: looking for look-alikes in a large file takes seconds.
        edited = await asyncio.to_thread(apply_edits, original, edits, arguments.path)
        await context.operations.write_bytes(path, edited.text.encode("utf-8"))
    return ToolOutput(
        f"Replaced {len(edits)} block(s) in {arguments.path}",
        {"diff": edited.diff, "firstChangedLine": edited.first_changed_line},
    )


# ls...


class LsArguments(Arguments, frozen=True):
    path: str | None = None
    limit: int | None = None


async def _ls(arguments: LsArguments, context: ToolContext) -> ToolOutput:
    shown = arguments.path or "."
    path = context.resolve(shown)
    if (await context.operations.stat(path)).kind != "dir":
        raise ToolError(f"ls {shown}: it is not a directory")
    entries = sorted(await context.operations.list(path), key=lambda entry: entry.name.lower())
    limit = MAX_ENTRIES if arguments.limit is None else max(arguments.limit, 1)
    lines = await asyncio.gather(*(_line(entry, path, context) for entry in entries[:limit]))
    cut = cut_head("\n".join(lines), max_lines=limit)
    if not entries:
        return ToolOutput("(empty directory)")
    if cut.lines < len(entries):
        note = f"[{cut.lines} of {len(entries)} entries. Use limit, or a directory further down.]"
        return ToolOutput(f"{cut.text}\n\n{note}")
    return ToolOutput(cut.text)


async def _line(entry: Entry, directory: str, context: ToolContext) -> str:
    # A name may hold a line break, which would make one entry look like two, or be no UTF-8.
    name = entry.name.encode("utf-8", "replace").decode().replace("\n", "\\n")
    is_dir = entry.kind == "dir"
    if entry.kind == "symlink":
        with contextlib.suppress(OperationError):  # it leads nowhere
            target = await context.operations.stat(posixpath.join(directory, entry.name))
            is_dir = target.kind == "dir"
    return f"{name}/" if is_dir else name


async def _load(
    path: str, context: ToolContext, operation: str, limit: int = MAX_FILE_BYTES
) -> bytes:
    status = await context.operations.stat(path)
    if status.kind != "file":
        # A pipe or a device would be read for ever.
        kind = "a directory; use ls" if status.kind == "dir" else "not a regular file"
        raise ToolError(f"{operation}: it is {kind}")
    if status.size > limit:
        raise ToolError(
            f"{operation}: it has {size_text(status.size)}; use bash to read parts of it"
        )
    return await context.operations.read_bytes(path, 0, limit)


READ = Tool(
    "read",
    "Read a text file (at most 2000 lines or 50 KB; offset is the first line, from 1, limit the number"
    " of lines) or an image (png, jpg, gif, webp).",
    ReadArguments,
    _read,
)
WRITE = Tool(
    "write",
    "Write a file, replacing what it had; directories above it are made.",
    WriteArguments,
    _write,
)
EDIT = Tool(
    "edit",
    "Replace text in a file. edits is a list of {oldText, newText}; each oldText occurs exactly once"
    " in the file as it is now, and no two overlap.",
    EditArguments,
    _edit,
)
LS = Tool("ls", "List a directory; directories, and links to some, end in /.", LsArguments, _ls)
