"""A guest whose root is the attacker, and an agent that lies. Judged by what happens on the host."""

import asyncio
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.peak import printed_by
from tests.support.processes import is_alive
from tests.support.waiting import PATIENCE_S

from taskvm import Sandbox, SandboxLostError
from taskvm.vm import eventrate

pytestmark = pytest.mark.vm

# Ask the CPU hotplug controller of q35 for an _OST notice (hw/acpi/cpu.c): each is an event on QEMU's monitor. An `out`
# instruction in a page of our own, because the guest's kernel has no /dev/port.
EVENT_FLOOD = """
import ctypes, mmap, sys
assert ctypes.CDLL(None).iopl(3) == 0
page = mmap.mmap(-1, 4096, prot=7)
page[:6], page[64:70] = bytes.fromhex("89fa89f0eec3"), bytes.fromhex("89fa89f0efc3")
start = ctypes.addressof(ctypes.c_char.from_buffer(page))
outb, outl = (ctypes.CFUNCTYPE(None, ctypes.c_uint, ctypes.c_uint)(start + at) for at in (0, 64))
outb(0xCD8, 0), outl(0xCD8, 0)
for _ in range(int(sys.argv[1])):
    outb(0xCDD, 2), outl(0xCE0, 0)
print("flooded")
"""


# A program, so that nothing of the runner's hides its peak. It prints if no event is kept, and how far memory rose.
FLOODED = """
import asyncio
from taskvm import Sandbox
from tests.conftest import GUEST
from tests.security.test_hostile_guest import EVENT_FLOOD
from tests.support.peak import Peak

async def main():
    async with Sandbox.create(**GUEST) as vm:
        flood = ["python3", "-c", EVENT_FLOOD]
        await vm.exec([*flood, "100"], user="root", check=True)  # what is loaded at the first use is no growth
        peak = Peak()
        done = await vm.exec([*flood, "8000"], user="root", check=True)
        print(done.stdout.strip(), vm._guest.machine._qmp.events.empty(), peak.growth_mib())

asyncio.run(main())
"""


def test_events_that_a_guest_causes_are_not_kept() -> None:
    """A root that floods QEMU's monitor with events takes none of the host's memory."""
    said, none_kept, growth_mib = printed_by(FLOODED)

    assert (said, none_kept) == ("flooded", "True")
    assert float(growth_mib) < 4  # 8000 events that are kept take 15


async def test_a_guest_that_goes_on_causing_events_is_ended(
    vm: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs the host time. The sandbox is lost soon, with the reason, and QEMU is gone."""
    monkeypatch.setattr(eventrate, "MAX_EVENTS", 500)  # a slow host's guest causes no more
    supervisor = vm.host_pid
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(SandboxLostError, match="floods it with events"):
            await vm.exec(["python3", "-c", EVENT_FLOOD, "100000000"], user="root")

    assert vm.state == "lost"
    await vm.close()
    assert not is_alive(supervisor)


async def test_qemu_cannot_have_more_memory_than_its_guest_and_an_overhead(vm: Sandbox) -> None:
    """The kernel holds the process that the guest may have taken over to it (RLIMIT_DATA)."""
    limits = Path(f"/proc/{vm._guest.machine.qemu_pid}/limits").read_text()

    (line,) = (line for line in limits.splitlines() if line.startswith("Max data size"))
    assert line.split()[3:5] == [str((GUEST["memory_mib"] + 256 + 1024) << 20)] * 2
