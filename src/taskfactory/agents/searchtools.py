"""The tools that search: grep and find. Both run ripgrep in the place where the tools act.

Programs get their own arguments, never a shell's, and their output is taken apart at NUL bytes, so that
neither a pattern nor a file's name can become an option or another result.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator

from taskfactory.agents.cutting import MAX_BYTES, cut_head, size_text
from taskfactory.agents.glob import compile_glob
from taskfactory.agents.operations import Ending
from taskfactory.agents.tools import Arguments, Tool, ToolContext, ToolOutput
from taskfactory.errors import OperationError, ToolError

MAX_MATCHES = 100
MAX_FOUND = 1000
MAX_LINE_CHARS = 500
# Of a line with a match ripgrep itself shows no more: a minified file is one line of megabytes.
_MAX_COLUMNS = 4 * MAX_LINE_CHARS
# The longest path (4096) and the longest line: what has no end after that is not ripgrep's output.
_MAX_RECORD = 64 * 1024
# The guest owns its ripgrep: what it says is bounded here as well.
_MAX_KEPT_BYTES = 1024 * 1024
_MAX_PATH = 4096  # PATH_MAX
_MAX_SCANNED_BYTES = 128 * 1024 * 1024  # of paths, as they are kept
_MAX_PRUNED_BYTES = 32 * 1024  # of arguments
_NOT_FOUND = 2  # ENOENT
_SHELL_NOT_FOUND = 127

_COMMON = ("rg", "--no-config", "--no-messages", "--hidden", "--color=never", "--sort=path")


# grep...


class GrepArguments(Arguments, frozen=True):
    pattern: str
    path: str | None = None
    glob: str | None = None
    ignore_case: bool = False
    literal: bool = False
    context: int = 0
    limit: int | None = None


async def _grep(arguments: GrepArguments, context: ToolContext) -> ToolOutput:
    shown = arguments.path or "."
    path = context.resolve(shown)
    is_dir = (await context.operations.stat(path)).kind == "dir"
    matches = _Matches(MAX_MATCHES if arguments.limit is None else max(arguments.limit, 1))
    place = ("./", path) if is_dir else (path, context.paths.root)
    options = (*_grep_options(arguments), "-e", arguments.pattern, "--", place[0])
    ending = await _ripgrep(options, place[1], matches.take, context)
    if _failed(ending, has_results=matches.count > 0, said=matches.rest()):
        raise ToolError(f"grep {arguments.pattern!r}: {matches.rest() or 'ripgrep failed'}")
    if not matches.count:
        return ToolOutput("No matches")
    cut = cut_head("\n".join(matches.lines), max_lines=len(matches.lines))
    notes = []
    if cut.by:
        shown_matches = sum(number < cut.lines for number in matches.at)
        notes.append(
            f"{shown_matches} matches shown, there are more ({size_text(MAX_BYTES)} at most):"
            " narrow the pattern"
        )
    elif ending.stopped:
        notes.append(
            f"{matches.count} matches shown, there are more: narrow the pattern or set limit"
        )
    if matches.cut_lines:
        notes.append(f"lines cut at {MAX_LINE_CHARS} characters: use read to see all")
    return ToolOutput(f"{cut.text}\n\n[{'. '.join(notes)}.]" if notes else cut.text)


def _grep_options(arguments: GrepArguments) -> Iterator[str]:
    yield from ("--line-number", "--with-filename", "--no-heading", "--null")
    yield from (f"--max-columns={_MAX_COLUMNS}", "--max-columns-preview")
    if arguments.ignore_case:
        yield "--ignore-case"
    if arguments.literal:
        yield "--fixed-strings"
    if arguments.context > 0:
        yield f"--context={min(arguments.context, 50)}"
    if arguments.glob is not None:
        yield f"--glob={arguments.glob}"
    yield "--glob=!.git"


class _Matches:
    """Takes ripgrep's output apart: path NUL number (`:` for a match, `-` around one) text, line by line."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.at: list[int] = []  # which of `lines` are matches
        self.lines: list[str] = []
        self.cut_lines = False
        self._next_group: int | None = None  # where the context of a match to come begins
        self._kept_bytes = 0
        self._pending = b""

    @property
    def count(self) -> int:
        return len(self.at)

    def take(self, data: bytes) -> bool:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._kept_bytes += min(len(line), _MAX_COLUMNS)
            if self._kept_bytes > _MAX_KEPT_BYTES:
                return False
            if not self._line(line.decode("utf-8", "replace")):
                return False
        return len(self._pending) <= _MAX_RECORD

    def rest(self) -> str:
        """Return what ripgrep said besides matches."""
        return "\n".join([*self.lines, self._pending.decode("utf-8", "replace")]).strip()

    def _line(self, line: str) -> bool:
        name, nul, found = line.partition("\0")
        if not nul:  # `--` between groups of context, or an error's text
            self._next_group = len(self.lines)
            self.lines.append(line[:_MAX_COLUMNS])
            return True
        number = found[: len(found) - len(found.lstrip("0123456789"))]
        mark, text = found[len(number) :][:1], found[len(number) + 1 :].rstrip("\r")
        if mark == ":":
            if self.count == self.limit:
                del self.lines[self._next_group or len(self.lines) :]
                return False
            self.at.append(len(self.lines))
            self._next_group = None
        if len(text) > MAX_LINE_CHARS:
            text, self.cut_lines = text[:MAX_LINE_CHARS] + "…", True
        self.lines.append(f"{name.removeprefix('./')}{mark}{number}{mark} {text}")
        return True


# find...


class FindArguments(Arguments, frozen=True):
    pattern: str
    path: str | None = None
    limit: int | None = None


async def _find(arguments: FindArguments, context: ToolContext) -> ToolOutput:
    shown = arguments.path or "."
    path = context.resolve(shown)
    if (await context.operations.stat(path)).kind != "dir":
        raise ToolError(f"find in {shown}: it is not a directory")
    limit = MAX_FOUND if arguments.limit is None else max(arguments.limit, 1)
    try:
        found = _Found(compile_glob(arguments.pattern), limit)
    except ValueError as error:
        raise ToolError(f"find: the pattern is refused: {error}") from None
    names = _Names(found.take_file)
    options = ("--files", "--null", "--glob=!.git", "--", "./")
    ending = await _ripgrep(options, path, names.take, context)
    if _failed(ending, has_results=bool(found.paths), said=names.rest()):
        raise ToolError(
            f"find {arguments.pattern!r} in {shown}: {names.rest() or 'ripgrep failed'}"
        )
    more, notes = ending.stopped, []
    if not more:
        ending = await _find_others(found, path, context)
        more = ending.stopped
        if ending.exit_code == _SHELL_NOT_FOUND:
            notes.append(
                "Symbolic links and empty directories are left out: find is not installed."
            )
    if not found.paths:
        return ToolOutput(" ".join(["No files found", *notes]))
    cut = cut_head("\n".join(found.paths), max_lines=limit)
    if more or cut.by:
        notes.append(f"{cut.lines} shown, there are more: narrow the pattern or set limit.")
    return ToolOutput(f"{cut.text}\n\n[{' '.join(notes)}]" if notes else cut.text)


async def _find_others(found: _Found, path: str, context: ToolContext) -> Ending:
    """Let `found` have what ripgrep does not list: symbolic links and empty directories that git does not ignore."""
    ignored: set[str] = set()
    room = _Room()

    def ignore(name: str) -> bool:
        ignored.add(name.rstrip("/"))
        return room.take(name)

    listing = ("git", "ls-files", "--others", "--ignored", "--exclude-standard", "--directory")
    await _quietly((*listing, "-z"), path, _Names(ignore).take, context)
    pruned = (("-o", "-path", f"./{escaped}") for escaped in _escaped(ignored))
    argv = [
        *("find", ".", "-mindepth", "1", "(", "-name", ".git"),
        *(argument for each in pruned for argument in each),
        *(")", "-prune", "-o", "(", "-type", "l", "-o", "-type", "d", "-empty", ")"),
        *("-printf", "%y%p\\0"),
    ]
    names = _Names(lambda record: found.take_other(record, ignored))
    return await _quietly(argv, path, names.take, context)


def _escaped(names: Iterable[str]) -> Iterator[str]:
    """Return names as patterns of find, as many as an argument list takes: the others are left out later."""
    left = _MAX_PRUNED_BYTES
    for name in sorted(names, key=len):
        pattern = re.sub(r"([*?\[\\])", r"\\\1", name)
        left -= len(pattern.encode("utf-8", "replace")) + 16
        if left < 0:
            return
        yield pattern


class _Room:
    """Counts what is kept of paths. The guest owns the programs that print them."""

    def __init__(self) -> None:
        self._left = _MAX_SCANNED_BYTES

    def take(self, path: str) -> bool:
        self._left -= sys.getsizeof(path)
        return self._left >= 0


class _Names:
    """Takes names that end in NUL and hands each on, until one is refused."""

    def __init__(self, each: Callable[[str], bool]) -> None:
        self._each = each
        self._pending = b""

    def take(self, data: bytes) -> bool:
        *names, self._pending = (self._pending + data).split(b"\0")
        for name in names:
            if len(name) > _MAX_PATH or not self._each(name.decode("utf-8", "replace")):
                return False
        return len(self._pending) <= _MAX_RECORD

    def rest(self) -> str:
        return self._pending.decode("utf-8", "replace").strip()


class _Found:
    """Keeps the paths that match, and the directories above each path that do."""

    def __init__(self, matches: Callable[[str], bool], limit: int) -> None:
        self.paths: list[str] = []
        self._matches = matches
        self._limit = limit
        self._seen: set[str] = set()
        self._room = _Room()

    def take_file(self, name: str) -> bool:
        path = name.removeprefix("./")
        return self._take(path, path)

    def take_other(self, record: str, ignored: set[str]) -> bool:
        """Take find's letter for the kind, and the path."""
        path = record[1:].removeprefix("./")
        if not ignored.isdisjoint([*_above(path), path]):
            return True
        return self._take(path, f"{path}/" if record.startswith("d") else path)

    def _take(self, path: str, shown: str) -> bool:
        for candidate, text in [*((name, f"{name}/") for name in _above(path)), (path, shown)]:
            if candidate in self._seen:
                continue
            self._seen.add(candidate)
            if not self._room.take(candidate):
                return False
            if self._matches(candidate):
                if len(self.paths) == self._limit:
                    return False
                self.paths.append(text.replace("\n", "\\n"))
        return True


def _above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _failed(ending: Ending, *, has_results: bool, said: str) -> bool:
    """Exit code 2 also means that some file could not be read, which is no reason to hide the others."""
    if ending.stopped or ending.exit_code in (0, 1):
        return False
    return ending.exit_code != 2 or (not has_results and bool(said))


async def _quietly(
    argv: Iterable[str], cwd: str, take: Callable[[bytes], bool], context: ToolContext
) -> Ending:
    """Run a program without what it says of what went wrong, which would be taken for names."""
    quiet = ("bash", "-c", 'exec "$@" 2>/dev/null', "bash")
    return await context.operations.exec((*quiet, *argv), cwd=cwd, on_output=take)


async def _ripgrep(
    options: tuple[str, ...], cwd: str, take: Callable[[bytes], bool], context: ToolContext
) -> Ending:
    try:
        return await context.operations.exec((*_COMMON, *options), cwd=cwd, on_output=take)
    except OperationError as error:
        if error.errno != _NOT_FOUND:
            raise
        cause = "ripgrep (rg) is not installed where the tools act; install it, or use bash"
        raise ToolError(f"{error}: {cause}") from error


GREP = Tool(
    "grep",
    "Search file contents with a regular expression (literal: a plain text). glob narrows the files,"
    " context shows lines around each match. At most 100 matches; .gitignore is respected.",
    GrepArguments,
    _grep,
)
FIND = Tool(
    "find",
    "Find files, directories and symbolic links by a glob pattern, such as *.py or src/**/*.ts; links are not"
    " followed. At most 1000; .gitignore is respected.",
    FindArguments,
    _find,
)
