"""The bash tool: a command, its output as it comes, and the end of it for the model."""

from __future__ import annotations

import codecs
import secrets

from taskfactory.agents.cutting import MAX_BYTES, MAX_LINES, Cut, cut_tail, size_text
from taskfactory.agents.tools import Arguments, Tool, ToolContext, ToolOutput
from taskfactory.errors import OperationError, ToolError

# A command may write for ever: the beginning and the end are kept, the middle is not.
KEPT_HEAD_BYTES = 16 * 1024 * 1024
KEPT_TAIL_BYTES = 4 * MAX_BYTES
# What watchers of one command are told; who wants more reads the output's file.
MAX_UPDATE_BYTES = 1024 * 1024


class BashArguments(Arguments, frozen=True):
    command: str
    timeout: float | None = None  # seconds


class OutputBuffer:
    """The output of a command in bounded memory: all of it up to a limit, then its beginning and its end."""

    def __init__(
        self, head_limit: int = KEPT_HEAD_BYTES, tail_limit: int = KEPT_TAIL_BYTES
    ) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._head_limit = head_limit
        self._tail_limit = tail_limit
        self.size = 0  # of everything that was added

    def add(self, data: bytes) -> None:
        self.size += len(data)
        room = self._head_limit - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._tail_limit:  # cut rarely: each cut moves bytes
            del self._tail[: -self._tail_limit]

    @property
    def left_out(self) -> int:
        """How many bytes of the middle are gone."""
        return self.size - len(self._head) - len(self._tail)

    def full(self) -> bytes:
        """Return the output, with a note where bytes are missing."""
        gap = f"\n[… {self.left_out} bytes are missing here …]\n" if self.left_out else ""
        return bytes(self._head) + gap.encode() + bytes(self._tail)

    def end(self) -> Cut:
        """Return the end of the output, cut to what a model reads."""
        recent = (self._head[-self._tail_limit :] + self._tail) if self._tail else self._head
        cut = cut_tail(bytes(recent).decode("utf-8", "replace"))
        return cut if cut.by or not self.left_out else Cut(cut.text, cut.lines, cut.lines, "bytes")


async def _bash(arguments: BashArguments, context: ToolContext) -> ToolOutput:
    if arguments.timeout is not None and not arguments.timeout > 0:
        raise ToolError(f"bash: timeout {arguments.timeout} is not a number of seconds above 0")
    output = OutputBuffer()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def on_output(data: bytes) -> bool:
        if output.size < MAX_UPDATE_BYTES and (text := decoder.decode(data)):
            context.on_update(text)
        output.add(data)
        return True

    ending = await context.operations.exec(
        context.paths.map_text(arguments.command),
        cwd=context.paths.root,
        on_output=on_output,
        timeout_s=arguments.timeout,
    )
    text, details = await _report(output, context)
    if ending.timed_out:
        raise ToolError(f"{text}\n\n[Ended after {arguments.timeout:g} s: timeout]".lstrip())
    if ending.exit_code != 0:
        raise ToolError(f"{text}\n\n[Exit code {ending.exit_code}]".lstrip())
    return ToolOutput(text or "(no output)", details)


async def _report(output: OutputBuffer, context: ToolContext) -> tuple[str, dict[str, str]]:
    """Return the end of the output; when it is cut, put all of it in a file where the tools can read it."""
    cut = output.end()
    if not cut.by:
        return cut.text.rstrip("\n"), {}
    path = f"/tmp/taskfactory-bash-{secrets.token_hex(8)}.log"
    try:
        await context.operations.write_bytes(path, output.full())
    except OperationError as error:
        return f"{cut.text}\n\n[The beginning is cut off, and not kept: {error}]", {}
    limit = f"{MAX_LINES} lines" if cut.by == "lines" else size_text(MAX_BYTES)
    note = f"[Only the last {cut.lines} lines ({limit} at most). All of the output: {path}]"
    return f"{cut.text}\n\n{note}", {"fullOutputPath": path}


BASH = Tool(
    "bash",
    "Run a command in bash, in the working directory. Standard output and error come together; the last"
    " 2000 lines or 50 KB are kept. timeout is in seconds.",
    BashArguments,
    _bash,
)
