"""Which exec a connection came from: the agent asks the kernel (guest/origin.c), the audit record has the answer."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from click.testing import CliRunner
from tests.conftest import GUEST
from tests.servers import http_server
from tests.support.waiting import PATIENCE_S

from taskvm import AuditEvent, Sandbox, read_audit
from taskvm.cli.commands import main

pytestmark = pytest.mark.vm


@asynccontextmanager
async def a_sandbox_and_a_server() -> AsyncIterator[tuple[Sandbox, str]]:
    with http_server() as seen:
        async with Sandbox.create(
            **GUEST,
            allow=["api.test"],
            resolve={"api.test": "127.0.0.1"},
            allow_addresses=[f"127.0.0.1:{seen.port}"],
        ) as vm:
            yield vm, f"curl -sS -m 90 http://api.test:{seen.port}"


def requests_of(vm: Sandbox) -> dict[str, AuditEvent]:
    return {event.path: event for event in read_audit(vm.audit_path) if event.kind == "request"}


async def test_the_record_names_the_exec_of_each_connection() -> None:
    """Of two that run at once, of a child of a child, and of a cgroup that the guest's root nests."""
    nest = "g=/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/nested; mkdir $g && echo $$ > $g/cgroup.procs && "
    async with a_sandbox_and_a_server() as (vm, curl):
        one = await vm.spawn(f"sh -c 'sh -c \"{curl}/one; true\"; true'; cat")
        two = await vm.spawn(f"{curl}/two; cat")
        three = await vm.spawn(f"{nest}{curl}/three; cat", user="root")
        for process in (one, two, three):
            assert await process.stdout.read(), await process.stderr.read()
        for process in (one, two, three):
            await process.close_stdin()
            assert (await process.wait()).exit_code == 0
        events = list(read_audit(vm.audit_path))

    seen = {event.path: event for event in events if event.kind == "request"}
    assert {path: event.exec for path, event in seen.items()} == {
        "/one": one.id, "/two": two.id, "/three": three.id,
    }  # fmt: skip
    assert len({one.id, two.id, three.id}) == 3
    joined = {event.connection: event.exec for event in seen.values()}
    assert all(e.exec == joined[e.connection] for e in events if e.connection)


async def test_a_result_is_joined_with_its_lines() -> None:
    """By its number, in Python and in `taskvm log --exec`."""
    async with a_sandbox_and_a_server() as (vm, curl):
        result = await vm.exec(f"{curl}/mine")
        other = await vm.exec(f"{curl}/other")
        lines = [event for event in read_audit(vm.audit_path) if event.exec == result.id]
        printed = CliRunner().invoke(main, ["log", "--exec", str(result.id), str(vm.audit_path)])

    assert {line.path for line in lines if line.kind == "request"} == {"/mine"}
    assert result.id != other.id
    assert len(printed.output.splitlines()) == len(lines)
    assert f"/mine, exec {result.id}" in printed.output
    assert "/other" not in printed.output


async def test_what_outlives_its_exec_is_named_by_none() -> None:
    """Its number may not be used by a host that has told the exec's end."""
    async with a_sandbox_and_a_server() as (vm, curl):
        await vm.exec(
            f"(until [ -e /tmp/go ]; do sleep 0.1; done; {curl}/late >/tmp/late; echo >/tmp/over) "
            "</dev/null >/dev/null 2>&1 &"
        )
        waited = await vm.exec(
            "touch /tmp/go; until [ -e /tmp/over ]; do sleep 0.1; done", timeout_s=PATIENCE_S
        )
        late = requests_of(vm)["/late"]

    assert waited.ok
    assert late.exec == 0
