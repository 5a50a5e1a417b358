"""taskvm.supervisor.tape: a bounded past, and readers of different speed."""

import asyncio

from taskvm.supervisor.tape import Piece, Tape


async def test_a_late_reader_is_told_what_it_missed() -> None:
    """It does not hold the writer."""
    tape = Tape(capacity=10)
    with tape.reader() as reader:
        await tape.write(b"0123456789abcde")

        assert await reader.read() == Piece(b"56789abcde", skipped=5)


async def test_a_new_reader_begins_with_what_is_kept() -> None:
    tape = Tape(capacity=4)
    await tape.write(b"abcdef")
    tape.end()

    with tape.reader() as reader:
        assert [await reader.read(), await reader.read()] == [Piece(b"cdef"), Piece(b"")]


async def test_a_lossless_reader_holds_the_writer_and_misses_nothing() -> None:
    """A second reader that is attached meanwhile gets everything too."""
    tape, data = Tape(capacity=8), bytes(range(100))
    seen: dict[str, bytes] = {"lossless": b"", "other": b""}

    async def follow(name: str, *, lossless: bool, pause_s: float) -> None:
        with tape.reader(lossless=lossless) as reader:
            while (piece := await reader.read()).data:
                seen[name] += piece.data
                await asyncio.sleep(pause_s)

    async with asyncio.TaskGroup() as group:
        group.create_task(follow("lossless", lossless=True, pause_s=0.001))
        group.create_task(follow("other", lossless=False, pause_s=0))
        await asyncio.sleep(0)
        await tape.write(data)
        tape.end()

    assert seen == {"lossless": data, "other": data}


async def test_a_lossless_reader_that_leaves_frees_the_writer() -> None:
    tape = Tape(capacity=4)
    async with asyncio.TaskGroup() as group:
        with tape.reader(lossless=True):
            writing = group.create_task(tape.write(b"0123456789"))
            await asyncio.sleep(0.01)
            assert not writing.done()

    assert tape.moved == 10


async def test_only_the_past_does_not_wait() -> None:
    tape = Tape()
    await tape.write(b"past")
    with tape.reader() as reader:
        assert (await reader.read(follow=False)).data == b"past"
        assert (await reader.read(follow=False)).data == b""
