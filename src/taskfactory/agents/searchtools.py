"""The tools that search: grep and find. Both run ripgrep in the place where the tools act.

ripgrep gets its own arguments, never a shell's, and its output is taken apart at NUL bytes, so that
neither a pattern nor a file's name can become an option or another result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
_MAX_SCANNED = 500_000  # paths
_NOT_FOUND = 2  # ENOENT

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
    options = ("--files", "--null", "--glob=!.git", "--", "./")
    ending = await _ripgrep(options, path, found.take, context)
    if _failed(ending, has_results=bool(found.paths), said=found.rest()):
        raise ToolError(
            f"find {arguments.pattern!r} in {shown}: {found.rest() or 'ripgrep failed'}"
        )
    if not found.paths:
        return ToolOutput("No files found")
    cut = cut_head("\n".join(found.paths), max_lines=limit)
    if ending.stopped or cut.by:
        note = f"[{cut.lines} shown, there are more: narrow the pattern or set limit.]"
        return ToolOutput(f"{cut.text}\n\n{note}")
    return ToolOutput(cut.text)


class _Found:
    """Takes paths that end in NUL, and keeps those that match, and the directories above them that do."""

    def __init__(self, matches: Callable[[str], bool], limit: int) -> None:
        self.paths: list[str] = []
        self._matches = matches
        self._limit = limit
        self._seen: set[str] = set()
        self._pending = b""

    def take(self, data: bytes) -> bool:
        *names, self._pending = (self._pending + data).split(b"\0")
        for name in names:
            path = name.decode("utf-8", "replace").removeprefix("./")
            if not self._path(path):
                return False
        return len(self._pending) <= _MAX_RECORD

    def rest(self) -> str:
        return self._pending.decode("utf-8", "replace").strip()

    def _path(self, path: str) -> bool:
        parts = path.split("/")
        above = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        for candidate, shown in [*((name, f"{name}/") for name in above), (path, path)]:
            if candidate in self._seen:
                continue
            if len(self._seen) == _MAX_SCANNED:
                return False
            self._seen.add(candidate)
            if self._matches(candidate):
                if len(self.paths) == self._limit:
                    return False
                self.paths.append(shown.replace("\n", "\\n"))
        return True


def _failed(ending: Ending, *, has_results: bool, said: str) -> bool:
    """Exit code 2 also means that some file could not be read, which is no reason to hide the others."""
    if ending.stopped or ending.exit_code in (0, 1):
        return False
    return ending.exit_code != 2 or (not has_results and bool(said))


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
    "Find files, and directories that hold some, by a glob pattern, such as *.py or src/**/*.ts. At most"
    " 1000; .gitignore is respected. Symbolic links and empty directories are not found: use ls or bash.",
    FindArguments,
    _find,
)
