"""Programs on a terminal of their own: job control, keys, size (Process.resize, guest/pty.c)."""

import asyncio

import pytest
from tests.support.waiting import PATIENCE_S

from taskvm import Process, Sandbox, UsageError

pytestmark = pytest.mark.vm
BOTH_SURFACES = True


async def read_until(process: Process, expected: bytes) -> bytes:
    """Return what the process writes up to the first `expected`; the runner's timeout ends a vain wait."""
    output = b""
    while expected not in output:
        data = await process.stdout.read()
        assert data, f"the output ended with {output!r}"
        output += data
    return output


async def wait_for_count(vm: Sandbox, pattern: str, count: int) -> None:
    """Wait until the guest's process list has `count` commands like `pattern`."""
    async with asyncio.timeout(PATIENCE_S):
        while (await vm.exec(f"pgrep -fc '{pattern}'")).stdout.strip() != str(count):
            await asyncio.sleep(0.05)


async def bare_shell(vm: Sandbox) -> Process:
    """An interactive shell at its first prompt, on a terminal that does not echo."""
    command = "stty -echo; PS1='ready> ' exec bash --norc --noediting"
    shell = await vm.spawn(["dash", "-c", command], pty=(24, 80))
    await read_until(shell, b"ready> ")
    return shell


async def test_a_program_finds_a_terminal_of_the_given_size(vm: Sandbox) -> None:
    """All three standard descriptors are the terminal, it has the size and belongs to the program's user."""
    command = "test -t 0 -a -t 1 -a -t 2 && stty size && stat -c %u $(tty) && id -u && echo $TERM"
    process = await vm.spawn(command, pty=(31, 97))
    output = b"".join([data async for data in process.stdout])
    size, owner, user, term = output.decode().split("\r\n")[:4]

    assert (size, term) == ("31 97", "xterm-256color")
    assert owner == user
    assert (await process.wait()).ok


async def test_the_callers_term_wins(vm: Sandbox) -> None:
    """$TERM of the call is what the program gets, once."""
    process = await vm.spawn("env | grep ^TERM=", pty=(24, 80), env={"TERM": "vt100"})

    assert b"".join([data async for data in process.stdout]) == b"TERM=vt100\r\n"


async def test_ctrl_c_interrupts_the_foreground_program_only(vm: Sandbox) -> None:
    """The shell lives on and can say how the program ended."""
    async with await bare_shell(vm) as shell:
        await shell.write(b"sleep 8642 &\nsleep 9753\n")
        await wait_for_count(vm, "sleep [9]753", 1)
        await shell.write(b"\x03")
        await wait_for_count(vm, "sleep [9]753", 0)
        await shell.write(b"echo status=$?\n")
        await read_until(shell, b"status=130")
        await wait_for_count(vm, "sleep [8]642", 1)


async def test_a_program_is_suspended_and_goes_on(vm: Sandbox) -> None:
    """Ctrl-Z stops it, the shell knows it as a job, fg brings it back."""
    async with await bare_shell(vm) as shell:
        await shell.write(b"cat\none\n")
        await read_until(shell, b"one\r\n")
        await shell.write(b"\x1a")
        stopped = await read_until(shell, b"ready> ")
        await shell.write(b"fg\ntwo\n")
        again = await read_until(shell, b"two\r\n")

    assert b"Stopped" in stopped
    assert again == b"cat\r\ntwo\r\n"


async def test_a_new_size_reaches_the_program(vm: Sandbox) -> None:
    """`resize` changes what the kernel says and signals SIGWINCH."""
    command = "trap 'stty size' WINCH; echo up; while :; do sleep 0.1; done"
    async with await vm.spawn(command, pty=(24, 80)) as process:
        await read_until(process, b"up\r\n")
        await process.resize(50, 132)
        output = await read_until(process, b"\r\n")

    assert output == b"50 132\r\n"


async def test_the_end_of_input_is_typed(vm: Sandbox) -> None:
    """A program that reads the terminal sees its end and leaves as it does by itself, every time."""
    for _ in range(5):
        process = await vm.spawn(["cat"], pty=(24, 80))
        await process.write(b"line\n")
        await process.close_stdin()
        output = b"".join([data async for data in process.stdout])

        assert output == b"line\r\nline\r\n"
        assert (await process.wait()).exit_code == 0


async def test_the_end_of_input_ends_a_shell_that_was_still_starting(vm: Sandbox) -> None:
    """It was typed before the shell had the terminal to itself, and meant nothing to it then."""
    shell = await vm.spawn(["bash", "--norc", "-i"], pty=(24, 80))
    await shell.write(b"echo $((6 * 7))\n")
    await shell.close_stdin()
    output = b"".join([data async for data in shell.stdout])

    assert b"\r42\r\n" in output
    assert (await shell.wait()).exit_code == 0


async def test_the_end_of_input_is_one_for_every_program_that_reads(vm: Sandbox) -> None:
    """As that of a pipe is; a last line that is not whole is read like another."""
    process = await vm.spawn("cat; cat; read nothing || echo over", pty=(24, 80))
    await process.write(b"half")
    await process.close_stdin()
    output = b"".join([data async for data in process.stdout])

    assert output == b"halfhalfover\r\n"  # the terminal's echo, then cat


async def test_the_last_words_on_a_terminal_are_not_lost(vm: Sandbox) -> None:
    """All output arrives, although a child of the program keeps the terminal open."""
    process = await vm.spawn("seq 20000; setsid sleep 77 & exec true", pty=(24, 80))
    output = b"".join([data async for data in process.stdout])

    assert output == "".join(f"{number}\r\n" for number in range(1, 20001)).encode()


async def test_the_end_of_the_program_hangs_its_terminal_up(vm: Sandbox) -> None:
    """Programs in the foreground get SIGHUP when the session's leader ends, as on any terminal."""
    process = await vm.spawn("sleep 5319 & sleep 0.3", pty=(24, 80))
    await process.wait()
    await wait_for_count(vm, "sleep [5]319", 0)

    await vm.exec("until [ $(ls /dev/pts) = ptmx ]; do sleep 0.1; done", timeout_s=PATIENCE_S)
    assert (await vm.exec("ls /dev/pts")).stdout.split() == ["ptmx"]


@pytest.mark.parametrize("size", [(0, 80), (24, -1), (24, 65536)])
async def test_an_impossible_size_is_refused_on_the_host(
    vm: Sandbox, size: tuple[int, int]
) -> None:
    """What the kernel's structure cannot hold is a usage error."""
    with pytest.raises(UsageError):
        await vm.spawn(["true"], pty=size)
