"""The seven tools (taskfactory.agents.filetools, taskfactory.agents.bashtool,
taskfactory.agents.searchtools) on this host's files.
"""

import asyncio
import os
import shutil
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from taskfactory.agents.bashtool import OutputBuffer
from taskfactory.agents.host import HostOperations
from taskfactory.agents.paths import PathMap
from taskfactory.agents.place import host_place, host_roots
from taskfactory.agents.tools import FileLocks, Tool, ToolContext, ToolOutput, builtin_tools
from taskfactory.errors import ToolError

TOOLS = {tool.name: tool for tool in builtin_tools()}


class Bench:
    """The tools, acting in one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.updates: list[str] = []
        place = host_place(root)
        self.context = ToolContext(place.operations, place.paths, FileLocks(), self.updates.append)

    async def call(self, tool: str, **arguments: Any) -> ToolOutput:
        return await TOOLS[tool].run(arguments, self.context)

    async def text(self, tool: str, **arguments: Any) -> str:
        return (await self.call(tool, **arguments)).text

    async def error(self, tool: str, **arguments: Any) -> str:
        with pytest.raises(ToolError) as caught:
            await self.call(tool, **arguments)
        return str(caught.value)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    root = tmp_path / "project"
    root.mkdir()
    return Bench(root)


def test_there_are_seven_tools_with_schemas() -> None:
    assert list(TOOLS) == ["read", "write", "edit", "bash", "grep", "find", "ls"]
    assert all(isinstance(tool, Tool) and tool.schema() for tool in TOOLS.values())


@pytest.mark.parametrize(
    "arguments", [{}, {"path": 1}, {"path": "x", "surprise": 1}, {"path": "x", "offset": "1"}]
)
async def test_wrong_arguments_are_told(bench: Bench, arguments: dict[str, Any]) -> None:
    assert "wrong arguments" in await bench.error("read", **arguments)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("read", {"path": "a\ud800"}),
        ("write", {"path": "a", "content": "\ud800"}),
        ("edit", {"path": "a", "edits": [{"oldText": "x", "newText": "\ud800"}]}),
        ("bash", {"command": "echo \ud800"}),
        ("bash", {"command": "echo \0"}),
        ("grep", {"pattern": "a\0b"}),
        ("ls", {"path": "a\0b"}),
    ],
)
async def test_text_that_no_system_takes_is_an_error(
    bench: Bench, tool: str, arguments: dict[str, Any]
) -> None:
    assert await bench.error(tool, **arguments)


# read...


async def test_read_gives_a_short_file_whole(bench: Bench) -> None:
    (bench.root / "a").write_text("one\ntwo\n")

    assert await bench.text("read", path="a") == "one\ntwo"
    assert await bench.text("read", path=str(bench.root / "a"), offset=2) == "two"


async def test_read_cuts_at_2000_lines_and_tells_where_to_go_on(bench: Bench) -> None:
    (bench.root / "a").write_text("".join(f"{n}\n" for n in range(1, 5001)))

    output = await bench.call("read", path="a")
    rest = await bench.call("read", path="a", offset=4001)

    assert output.text.startswith("1\n2\n")
    assert "\n2000\n\n[Lines 1-2000 of 5000. Go on with offset=2001.]" in output.text
    assert output.details == {"nextOffset": 2001, "totalLines": 5000}
    assert rest.text.endswith("\n5000")


async def test_read_cuts_at_50_kilobytes(bench: Bench) -> None:
    (bench.root / "a").write_text("".join("x" * 1023 + "\n" for _ in range(100)))

    text = await bench.text("read", path="a")

    assert text.endswith("[Lines 1-50 of 100, 50.0 KB at most. Go on with offset=51.]")


async def test_read_with_a_limit_of_nothing_reads_a_line(bench: Bench) -> None:
    (bench.root / "a").write_text("1\n2\n3\n")

    assert await bench.text("read", path="a", limit=0) == (
        "1\n\n[Lines 1-1 of 3. Go on with offset=2.]"
    )


async def test_read_with_a_limit_tells_the_next_offset(bench: Bench) -> None:
    (bench.root / "a").write_text("a\nb\nc\n")

    assert "Lines 2-2 of 3. Go on with offset=3" in await bench.text(
        "read", path="a", offset=2, limit=1
    )


async def test_read_of_one_endless_line_points_to_bash(bench: Bench) -> None:
    (bench.root / "a").write_text("x" * 60_000)

    assert "Use bash: sed -n '1p'" in await bench.text("read", path="a")


async def test_read_past_the_end_is_an_error(bench: Bench) -> None:
    (bench.root / "a").write_text("a\n")

    assert "past its 1 lines" in await bench.error("read", path="a", offset=2)


@pytest.mark.parametrize("path", ["missing", ".", "/dev/zero"])
async def test_read_refuses_what_is_no_file(bench: Bench, path: str) -> None:
    assert await bench.error("read", path=path)


async def test_read_shows_an_image(bench: Bench) -> None:
    (bench.root / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n....")

    output = await bench.call("read", path="a.png")

    assert [image.media_type for image in output.images] == ["image/png"]


# write and edit...


async def test_write_makes_directories(bench: Bench) -> None:
    text = await bench.text("write", path="a/b/c.txt", content="grün")

    assert text == "Wrote 5 bytes to a/b/c.txt"
    assert (bench.root / "a/b/c.txt").read_text() == "grün"


async def test_edit_takes_a_list_or_the_old_pair(bench: Bench) -> None:
    (bench.root / "a").write_text("one two three")

    await bench.call("edit", path="a", edits=[{"oldText": "one", "newText": "1"}])
    output = await bench.call("edit", path="a", oldText="two", newText="2")

    assert (bench.root / "a").read_text() == "1 2 three"
    assert output.details["firstChangedLine"] == 1
    assert "+1 2 three" in output.details["diff"]


async def test_a_failed_edit_changes_nothing(bench: Bench) -> None:
    (bench.root / "a").write_text("one two")

    edits = [{"oldText": "one", "newText": "1"}, {"oldText": "nine", "newText": "9"}]
    assert "edits[1]" in await bench.error("edit", path="a", edits=edits)
    assert "go together" in await bench.error("edit", path="a", oldText="one")
    assert (bench.root / "a").read_text() == "one two"


async def test_edits_of_one_file_at_once_do_not_lose_each_other(bench: Bench) -> None:
    (bench.root / "a").write_text(" ".join(f"<{n}>" for n in range(20)))

    async with asyncio.TaskGroup() as group:
        for n in range(20):
            group.create_task(bench.call("edit", path="a", oldText=f"<{n}>", newText=f"[{n}]"))

    assert (bench.root / "a").read_text() == " ".join(f"[{n}]" for n in range(20))


# bash...


async def test_bash_gives_both_outputs_and_streams_them(bench: Bench) -> None:
    assert await bench.text("bash", command="pwd; echo err >&2") == f"{bench.root}\nerr"
    assert "".join(bench.updates) == f"{bench.root}\nerr\n"
    assert await bench.text("bash", command="true") == "(no output)"


async def test_bash_keeps_the_end_and_puts_all_of_it_where_read_finds_it(bench: Bench) -> None:
    output = await bench.call("bash", command="seq 1 5000")

    path = output.details["fullOutputPath"]
    assert output.text.startswith("3001\n")
    assert "5000\n\n[Only the last 2000 lines" in output.text
    assert (await bench.text("read", path=path)).startswith("1\n2\n")
    Path(path).unlink()


async def test_a_failing_command_is_an_error_with_its_output(bench: Bench) -> None:
    assert await bench.error("bash", command="echo out; exit 7") == "out\n\n[Exit code 7]"


async def test_a_command_that_takes_too_long_is_an_error_with_its_output(bench: Bench) -> None:
    for timeout in (1, 5, 100):  # a busy host may take seconds to begin
        text = await bench.error("bash", command="echo out; sleep 600", timeout=timeout)
        if text.startswith("out"):
            break

    assert text == f"out\n\n[Ended after {timeout} s: timeout]"


def test_an_endless_output_is_held_in_bounded_memory() -> None:
    buffer = OutputBuffer(head_limit=1000, tail_limit=100)

    for number in range(10_000):
        buffer.add(b"%05d\n" % number)

    assert len(buffer.full()) < 1400
    assert buffer.full().startswith(b"00000\n")
    assert buffer.full().endswith(b"09999\n")
    assert b"bytes are missing here" in buffer.full()
    assert buffer.end().by == "bytes"


async def test_watchers_of_an_endless_output_hear_its_beginning_only(bench: Bench) -> None:
    output = await bench.call("bash", command="head -c 5000000 /dev/zero | tr '\\0' 'x'")

    Path(output.details["fullOutputPath"]).unlink()
    assert 1_000_000 < sum(map(len, bench.updates)) < 1_200_000


# grep and find...


async def test_grep_counts_the_matches_that_it_shows(bench: Bench) -> None:
    """50 KB are reached long before so many long lines."""
    (bench.root / "a").write_text(("hit " + "x" * 489 + "\n") * 3000)

    text = await bench.text("grep", pattern="hit", limit=2500)

    shown, _, note = text.rpartition("\n\n")
    count = shown.count("hit")
    assert 80 < count < 120
    assert note == (
        f"[{count} matches shown, there are more (50.0 KB at most): narrow the pattern.]"
    )


async def test_grep_shows_file_line_and_text(bench: Bench) -> None:
    (bench.root / "a.py").write_text("x = 1\nprint(x)\n")
    (bench.root / "b:1.txt").write_text("print\n")
    (bench.root / ".hidden").write_text("print\n")

    assert await bench.text("grep", pattern=r"print\b") == (
        ".hidden:1: print\na.py:2: print(x)\nb:1.txt:1: print"
    )
    assert (
        await bench.text("grep", pattern="PRINT", ignoreCase=True, glob="*.py")
        == "a.py:2: print(x)"
    )
    assert await bench.text("grep", pattern="print(", literal=True) == "a.py:2: print(x)"
    assert "a.py-1- x = 1\na.py:2: print(x)" in await bench.text("grep", pattern="t.x", context=1)
    assert await bench.text("grep", pattern="nowhere") == "No matches"


async def test_grep_of_one_file_names_it(bench: Bench) -> None:
    (bench.root / "a").write_text("hit\n")

    assert await bench.text("grep", pattern="hit", path="a") == f"{bench.root}/a:1: hit"


async def test_grep_stops_at_100_matches_and_500_characters(bench: Bench) -> None:
    (bench.root / "a").write_text("".join(f"hit {n}\n" for n in range(300)))
    (bench.root / "b").write_text("long " + "x" * 100_000 + "\n")

    many = await bench.text("grep", pattern="hit")
    long = await bench.text("grep", pattern="long")

    assert many.count("a:") == 100
    assert many.endswith("[100 matches shown, there are more: narrow the pattern or set limit.]")
    assert len(long) < 700
    assert "cut at 500 characters" in long


async def test_a_match_that_is_not_shown_leaves_no_context_behind(bench: Bench) -> None:
    (bench.root / "a").write_text("hit\n1\n2\n3\n4\nhit\n")

    text = await bench.text("grep", pattern="hit", context=1, limit=1)

    assert text.split("\n\n")[0] == "a:1: hit\na-2- 1"


async def test_what_cannot_be_read_hides_nothing_else(bench: Bench) -> None:
    (bench.root / "a").write_text("hit\n")
    (bench.root / "dangling").symlink_to("nowhere")

    assert await bench.text("grep", pattern="hit") == "a:1: hit"
    assert await bench.text("grep", pattern="miss") == "No matches"
    assert await bench.text("find", pattern="a") == "a"


@pytest.mark.parametrize("pattern", ["--files", "-e", "--pre=touch evil"])
async def test_a_pattern_is_never_an_option(bench: Bench, pattern: str) -> None:
    (bench.root / "a").write_text("x")

    assert await bench.text("grep", pattern=pattern) == "No matches"
    assert sorted(path.name for path in bench.root.iterdir()) == ["a"]


async def test_a_broken_pattern_is_told(bench: Bench) -> None:
    assert "regex parse error" in await bench.error("grep", pattern="(")


async def test_a_place_without_ripgrep_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ToolContext(
        HostOperations({"PATH": "/nowhere"}), bench.context.paths, FileLocks(), lambda text: None
    )

    with pytest.raises(ToolError, match="ripgrep .* is not installed"):
        await TOOLS["grep"].run({"pattern": "x"}, context)


async def test_find_lists_files_and_directories(bench: Bench) -> None:
    for name in ("src/a.py", "src/deep/b.py", "c.txt", ".env", ".git/config", "new\nline.py"):
        path = bench.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    assert await bench.text("find", pattern="*.py") == "new\\nline.py\nsrc/a.py\nsrc/deep/b.py"
    assert await bench.text("find", pattern="src/*.py") == "src/a.py"
    assert await bench.text("find", pattern="d*") == "src/deep/"
    assert await bench.text("find", pattern=".e*") == ".env"
    assert await bench.text("find", pattern="*.py", path="src") == "a.py\ndeep/b.py"
    assert await bench.text("find", pattern="*.rs") == "No files found"
    assert await bench.text("find", pattern="config") == "No files found"


async def test_find_shows_links_and_empty_directories(bench: Bench) -> None:
    """After the files, those too that lead nowhere; nothing is followed."""
    (bench.root / "a" / "empty").mkdir(parents=True)
    (bench.root / "file").touch()
    (bench.root / "to-dir").symlink_to(".")
    (bench.root / "a" / "to-nothing\n").symlink_to("nowhere")

    everything = await bench.text("find", pattern="**")

    assert sorted(everything.splitlines()) == [
        "a/",
        "a/empty/",
        "a/to-nothing\\n",
        "file",
        "to-dir",
    ]
    assert everything.startswith("file\n")
    assert await bench.text("find", pattern="to-*", limit=1) in (
        "a/to-nothing\\n\n\n[1 shown, there are more: narrow the pattern or set limit.]",
        "to-dir\n\n[1 shown, there are more: narrow the pattern or set limit.]",
    )
    assert await bench.text("find", pattern="*", path="a/empty") == "No files found"


async def test_find_leaves_out_the_links_that_git_ignores(bench: Bench) -> None:
    """Those in ignored directories, and those that a pattern names; signs of patterns in names are no patterns."""
    subprocess.run(["git", "init", "-q", bench.root], check=True)
    (bench.root / ".gitignore").write_text("node_modules/\n/result\n/\\*\\[x]\n")
    for name in ("node_modules/.bin", "pkg/node_modules/.bin", "*[x]/empty", "bx/empty"):
        (bench.root / name).mkdir(parents=True)
        (bench.root / name / "tool").symlink_to("nowhere")
    for name in ("result", "pkg/result"):
        (bench.root / name).symlink_to("nowhere")

    found = await bench.text("find", pattern="**")
    below = await bench.text("find", pattern="**", path="pkg")

    expected = [".gitignore", "bx/", "bx/empty/", "bx/empty/tool", "pkg/", "pkg/result"]
    assert sorted(found.splitlines()) == expected
    assert below == "result"


async def test_find_says_what_it_cannot_look_for(bench: Bench, tmp_path: Path) -> None:
    """Where there is no find(1), files are found."""
    (bench.root / "file").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("rg", "bash"):
        (programs / name).symlink_to(shutil.which(name) or "")
    operations = HostOperations({"PATH": str(programs)})
    context = ToolContext(operations, bench.context.paths, FileLocks(), lambda text: None)

    text = (await TOOLS["find"].run({"pattern": "*"}, context)).text

    assert text.startswith("file\n\n[Symbolic links and empty directories are left out")


@pytest.mark.parametrize(
    "said",
    [
        b"a" * 5000 + b"\0",
        b"/".join([b"a"] * 40_000) + b"\0",
        b"a" * 100_000,
        b"".join(b"%d" % n + b"/a" * 2000 + b"\0" for n in range(60)),
    ],
    ids=["long", "deep", "endless", "many"],
)
async def test_a_find_that_says_what_no_find_would_is_stopped(
    bench: Bench, tmp_path: Path, said: bytes
) -> None:
    """The guest owns it: each directory above a path is kept, too."""
    (tmp_path / "said").write_bytes(said)
    (tmp_path / "rg").write_text(f"#!/bin/sh\nexec cat {tmp_path}/said\n")
    (tmp_path / "rg").chmod(0o755)
    operations = HostOperations({"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    context = ToolContext(operations, bench.context.paths, FileLocks(), lambda text: None)

    tracemalloc.start()
    await TOOLS["find"].run({"pattern": "nothing"}, context)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 200 << 20


async def test_find_respects_gitignore_and_stops_at_its_limit(bench: Bench) -> None:
    (bench.root / ".git").mkdir()
    (bench.root / ".gitignore").write_text("skipped\n")
    for n in range(30):
        (bench.root / f"f{n:02}.x").write_text("")
    (bench.root / "skipped").mkdir()
    (bench.root / "skipped" / "a.x").write_text("")

    text = await bench.text("find", pattern="*.x", limit=20)

    assert text.startswith("f00.x\n")
    assert text.endswith("[20 shown, there are more: narrow the pattern or set limit.]")
    assert "skipped" not in await bench.text("find", pattern="*.x")


# ls...


async def test_ls_sorts_and_marks_directories(bench: Bench) -> None:
    for name in ("b", ".dot", "C"):
        (bench.root / name).write_text("")
    (bench.root / "a").mkdir()

    assert await bench.text("ls") == ".dot\na/\nb\nC"
    assert await bench.text("ls", path="a") == "(empty directory)"
    assert "not a directory" in await bench.error("ls", path="b")


async def test_ls_marks_a_link_as_what_it_leads_to(bench: Bench) -> None:
    (bench.root / "dir").mkdir()
    (bench.root / "file").touch()
    for name, target in (("to-dir", "dir"), ("to-file", "file"), ("to-nothing", "gone")):
        (bench.root / name).symlink_to(target)
    (bench.root / "to-itself").symlink_to("to-itself")

    assert await bench.text("ls") == "dir/\nfile\nto-dir/\nto-file\nto-itself\nto-nothing"


async def test_ls_shows_names_that_are_no_text(bench: Bench) -> None:
    (bench.root / os.fsdecode(b"\xff\nx")).touch()

    assert await bench.text("ls") == "?\\nx"


async def test_ls_stops_at_500(bench: Bench) -> None:
    for n in range(600):
        (bench.root / f"f{n}").touch()

    assert (await bench.text("ls")).endswith(
        "[500 of 600 entries. Use limit, or a directory further down.]"
    )


# Paths...


async def test_host_paths_mean_the_places_own(tmp_path: Path) -> None:
    """A place whose files lie elsewhere than the host path that the model was told."""
    guest = tmp_path / "guest"
    guest.mkdir()
    (guest / "a").write_text("guest's")
    paths = PathMap(host_roots=host_roots(tmp_path / "host"), root=str(guest), home=str(guest))
    context = ToolContext(host_place(guest).operations, paths, FileLocks())

    read = await TOOLS["read"].run({"path": str(tmp_path / "host" / "a")}, context)
    ran = await TOOLS["bash"].run({"command": f"cat {tmp_path}/host/a"}, context)

    assert (read.text, ran.text) == ("guest's", "guest's")
