"""Commands in a real guest: output, input, endings, and the death of everything they started.

Covers taskvm.commands: the account, directory and variables that they start with.
"""

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
from tests.support.waiting import PATIENCE_S, growing

from taskvm import CommandError, GuestError, Sandbox, UsageError

pytestmark = pytest.mark.vm
BOTH_SURFACES = True


async def test_a_list_is_executed_as_it_is(vm: Sandbox) -> None:
    """No shell touches an argument vector."""
    result = await vm.exec(["printf", "%s|", "a b", "$HOME", "*", ""])

    assert result.stdout == "a b|$HOME|*||"
    assert result.ok


async def test_a_string_runs_in_the_guests_shell(vm: Sandbox) -> None:
    """Pipes, variables and the shell's own exit status work."""
    result = await vm.exec("echo $((6*7)) | tr 4 X; exit 3")

    assert (result.stdout, result.exit_code) == ("X2\n", 3)


async def test_standard_output_and_error_are_apart(vm: Sandbox) -> None:
    """Each stream arrives on its own."""
    result = await vm.exec("echo out; echo err >&2")

    assert (result.stdout, result.stderr) == ("out\n", "err\n")


async def test_merged_output_keeps_the_order(vm: Sandbox) -> None:
    """With merge_output both streams share one pipe."""
    async with await vm.spawn("echo 1; echo 2 >&2; echo 3", merge_output=True) as process:
        output = b"".join([data async for data in process.stdout])

    assert output == b"1\n2\n3\n"


async def test_output_is_live(vm: Sandbox) -> None:
    """A line is readable while the process still runs."""
    async with await vm.spawn("echo first; cat") as process:
        first = await process.stdout.read()
        await process.write(b"second\n")
        second = await process.stdout.read()
        await process.close_stdin()
        result = await process.wait()

    assert (first, second, result.exit_code) == (b"first\n", b"second\n", 0)


async def test_a_command_that_ends_leaves_its_source_of_input(asynchronous_vm: Sandbox) -> None:
    """It may have more to say, and nobody to say it to. (A synchronous source blocks its caller's own thread.)"""
    left = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield b"first\n"
            await asyncio.Event().wait()
        finally:
            left.append("the source")

    async with asyncio.timeout(PATIENCE_S):
        result = await asynchronous_vm.exec("head -1", stdin=endless())

    assert (result.stdout, left) == ("first\n", ["the source"])


async def test_what_a_source_of_input_raises_is_raised(vm: Sandbox) -> None:
    """Also what looks like the end of the command's own reading."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"first\n"
        raise BrokenPipeError("the source's own")

    with pytest.raises(BrokenPipeError, match="the source's own"):
        await vm.exec("cat", stdin=broken())
    with pytest.raises(BrokenPipeError, match="the source's own"):
        await vm.files.write_stream("/tmp/broken", broken())

    assert not await vm.files.exists("/tmp/broken")


async def test_stdin_takes_bytes_and_streams(vm: Sandbox) -> None:
    """Standard input is bytes or an asynchronous stream, and ends."""

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(5):
            yield f"{number}".encode()

    from_bytes = await vm.exec("wc -c", stdin=b"x" * 1_000_000)
    from_text = await vm.exec("cat", stdin="grün")
    from_stream = await vm.exec("cat", stdin=pieces())

    assert from_text.stdout_bytes == "grün".encode()
    assert from_bytes.stdout.strip() == "1000000"
    assert from_stream.stdout == "01234"


async def test_a_wrong_argument_is_told_before_anything_starts(vm: Sandbox) -> None:
    """A working directory is absolute, a variable has a name, a limit of time is one; and the sandbox goes on."""
    for arguments in ({"cwd": "src"}, {"env": {"A=B": "x"}}, {"timeout_s": 0}):
        with pytest.raises(UsageError):
            await vm.exec("true", **arguments)  # type: ignore[arg-type]  # one of several kinds

    assert (await vm.exec("true")).ok


async def test_what_no_request_can_hold_is_refused_and_costs_no_sandbox(vm: Sandbox) -> None:
    """Arguments or variables beyond what the agent takes at once, and signals that there are not."""
    process = await vm.spawn(["sleep", "600"])
    many = [f"{number:0100000}" for number in range(20)]
    for call in (
        lambda: vm.exec(["true", *many]),
        lambda: vm.exec("true", env={f"A{number}": text for number, text in enumerate(many)}),
        lambda: vm.files.read_text("/" + "x" * 2_000_000),
        lambda: process.kill(65),
        lambda: process.kill(-1),
        lambda: process.kill("TERM"),  # type: ignore[arg-type]  # the mistake
    ):
        with pytest.raises(UsageError):
            await call()
    await process.kill(64)
    ended = await process.wait()

    assert ended.signal == 64
    assert (await vm.exec(["true", *many[:10]])).ok


async def test_every_byte_of_large_output_arrives(vm: Sandbox) -> None:
    """Sixteen megabytes keep their length and their content."""
    result = await vm.exec("head -c 16000000 /dev/zero | tr '\\0' 'q'")

    assert result.stdout_bytes == b"q" * 16_000_000


async def test_text_is_decoded_across_chunk_borders(vm: Sandbox) -> None:
    """A character that is cut by a chunk comes out whole."""
    command = r"printf '\xe2\x82'; sleep 0.2; printf '\xac!'"
    async with await vm.spawn(command) as process:
        text = "".join([piece async for piece in process.stdout.text()])

    assert text == "€!"


async def test_working_directory_and_environment(vm: Sandbox) -> None:
    """cwd and env are the call's; nothing of the host's environment is there."""
    result = await vm.exec("pwd; echo $GREETING; env", cwd="/tmp", env={"GREETING": "hello"})

    lines = result.stdout.splitlines()
    assert lines[:2] == ["/tmp", "hello"]
    assert not any(line.startswith(("PYTEST", "VIRTUAL_ENV", "SSH_")) for line in lines)


@pytest.mark.parametrize(
    ("command", "number"),
    [(["/no/such/program"], 2), (["/etc/passwd"], 13), (["no-such-program"], 2)],
)
async def test_a_program_that_cannot_start_says_why(
    vm: Sandbox, command: list[str], number: int
) -> None:
    """The guest's errno is in the error."""
    with pytest.raises(GuestError) as caught:
        await vm.exec(command)

    assert caught.value.errno == number
    assert command[0] in str(caught.value)


async def test_a_missing_working_directory_is_told_from_a_missing_program(vm: Sandbox) -> None:
    """The failed call is named."""
    with pytest.raises(GuestError) as caught:
        await vm.exec(["true"], cwd="/no/such/dir")

    assert caught.value.call == "chdir"


async def test_check_raises_with_the_output(vm: Sandbox) -> None:
    """check=True turns an exit status into an error that holds the result."""
    with pytest.raises(CommandError, match="exit code 4.*broken") as caught:
        await vm.exec("echo broken >&2; exit 4", check=True)

    assert caught.value.result.exit_code == 4


async def test_a_signal_is_reported_as_one(vm: Sandbox) -> None:
    """A process that a signal ends shows the signal, and 128 + its number."""
    result = await vm.exec("kill -SEGV $$")

    assert (result.signal, result.exit_code) == (signal.SIGSEGV, 128 + signal.SIGSEGV)
    assert "SIGSEGV" in result.outcome


async def test_kill_reaches_the_process_group(vm: Sandbox) -> None:
    """A child in the same group gets the signal too."""
    process = await vm.spawn(
        "trap 'echo parent' TERM; (trap 'echo child; exit' TERM; echo up; sleep 60 & wait) & wait; wait"
    )
    await process.stdout.read()
    await process.kill(signal.SIGTERM)
    output = b"".join([data async for data in process.stdout])

    assert b"child" in output
    assert b"parent" in output


async def gone(vm: Sandbox, pattern: str) -> None:
    """Wait until no process of the guest matches: the kernel ends what was killed in its own time."""
    async with asyncio.timeout(PATIENCE_S):
        while (await vm.exec(["pgrep", "-fc", pattern])).stdout.strip() != "0":
            await asyncio.sleep(0.05)


async def test_a_timeout_ends_double_forked_daemons(vm: Sandbox) -> None:
    """What an exec started dies with it: setsid, nohup and ignored signals do not help."""
    command = (
        "rm -f /tmp/up; setsid bash -c 'trap \"\" TERM HUP INT; >/tmp/up; exec -a taskvm-daemon sleep 500' "
        ">/dev/null 2>&1 & until test -e /tmp/up; do sleep 0.01; done; echo started; sleep 500"
    )

    for limit_s in growing(1):
        result = await vm.exec(["bash", "-c", command], timeout_s=limit_s)
        if result.stdout:
            break

    assert result.timed_out
    assert result.stdout == "started\n"
    await gone(vm, "taskvm-[d]aemon|sleep [5]00")


async def test_cancelling_the_call_ends_what_it_started(asynchronous_vm: Sandbox) -> None:
    """A cancelled exec leaves nothing running in the guest."""
    vm = asynchronous_vm
    task = asyncio.get_running_loop().create_task(vm.exec("sleep 4321"))
    while (await vm.exec("pgrep -fc 'sleep [4]321'")).stdout.strip() == "0":
        await asyncio.sleep(0.05)

    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    await gone(vm, "sleep [4]321")


async def test_a_background_child_that_holds_stdout_does_not_hold_the_exec(vm: Sandbox) -> None:
    """The exec ends with its main process, although a child keeps the pipe open."""
    result = await vm.exec("sleep 5500 & echo done", timeout_s=PATIENCE_S)

    assert (result.stdout, result.timed_out) == ("done\n", False)


async def test_the_last_bytes_before_the_exit_are_not_lost(vm: Sandbox) -> None:
    """Output that is still in the pipe when the process ends arrives, every time."""
    results = [await vm.exec(["head", "-c", "50000", "/dev/zero"]) for _ in range(20)]

    assert [len(result.stdout_bytes) for result in results] == [50000] * 20


async def test_an_unread_stream_blocks_only_its_writer(vm: Sandbox) -> None:
    """A process whose output nobody reads stops; the next command runs."""
    flood = await vm.spawn("yes")
    result = await vm.exec(["echo", "alive"])
    flooded = await flood.stdout.read()
    await flood.kill_all()

    assert result.stdout == "alive\n"
    assert flooded.startswith(b"y\n")


async def test_many_commands_at_once_keep_their_outputs_apart(vm: Sandbox) -> None:
    """Sixty-four concurrent commands each get their own bytes."""
    commands = [f"for i in $(seq 50); do echo {number}; done" for number in range(64)]
    results = await asyncio.gather(*(vm.exec(command) for command in commands))

    assert [result.stdout for result in results] == [f"{number}\n" * 50 for number in range(64)]


async def test_leaving_the_process_block_ends_it(vm: Sandbox) -> None:
    """`async with` around a process does not leave it running."""
    async with await vm.spawn("sleep 7654"):
        pass

    await gone(vm, "sleep [7]654")


async def test_a_nul_in_an_argument_is_refused_on_the_host(vm: Sandbox) -> None:
    """What execve cannot express is an error before anything is sent."""
    with pytest.raises(UsageError):
        await vm.exec(["echo", "a\0b"])
