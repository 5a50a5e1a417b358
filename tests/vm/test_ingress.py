"""The way into a real guest (taskvm.net.ingress): real servers there, real clients here."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S, until

from taskvm import Forward, Process, Sandbox, SandboxStateError
from taskvm.sync import Sandbox as BlockingSandbox
from taskvm.wire.websocket import acceptance_of

pytestmark = pytest.mark.vm
BOTH_SURFACES = True

MEGABYTES = 20
RESET = {7, 55, 56}  # curl's statuses: a connection broken off as it is made, sends or receives
# Serves each connection of {address} with serve(connection) in a thread of its own.
SERVER = """
import hashlib, socket, threading
def serve(c):
{body}
s = socket.create_server(("{host}", 7000), family=socket.{family}, backlog=300)
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"""
ECHO = "while d := c.recv(65536): c.sendall(d)\nc.close()"
DIGEST = """h = hashlib.sha256()
while d := c.recv(65536): h.update(d)
c.sendall(h.hexdigest().encode())
c.close()"""
SOURCE = f"""c.sendall(bytes(range(256)) * (4096 * {MEGABYTES}))
c.shutdown(socket.SHUT_WR)
d = b""
while p := c.recv(65536): d += p
open("/tmp/late", "wb").write(d)
c.close()"""


@asynccontextmanager
async def serving(
    vm: Sandbox, body: str, host: str = "127.0.0.1", family: str = "AF_INET"
) -> AsyncIterator[Forward]:
    """A server in the guest that serves as `body` says, forwarded."""
    indented = "\n".join("    " + line for line in body.splitlines())
    code = SERVER.format(body=indented, host=host, family=family)
    async with await vm.spawn(["python3", "-c", code]) as process:
        await ready(process)
        async with vm.forward(7000) as forward:
            yield forward


async def ready(process: Process) -> None:
    async with asyncio.timeout(PATIENCE_S):
        line = await process.stdout.read()
    assert line == b"ready\n"


async def curl(*arguments: str) -> tuple[str, int]:
    done = await asyncio.to_thread(
        subprocess.run, ["curl", "-sS", "-m", "100", *arguments], capture_output=True, text=True
    )
    return done.stdout, done.returncode


def refused(forward: Forward) -> bool:
    try:
        socket.create_connection((forward.host, forward.port)).close()
    except ConnectionRefusedError:
        return True
    return False


def audit_of(vm: Sandbox) -> list[dict[str, object]]:
    """The whole lines: another thread may be writing one."""
    lines = vm.audit_path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


async def all_ended(vm: Sandbox, count: int) -> None:
    """Wait until both sides of so many connections have ended: curl leaves when it has the whole answer."""
    await until(lambda: sum("duration_ms" in event for event in audit_of(vm)) >= count)


async def test_sixty_parallel_requests_reach_a_web_server(vm: Sandbox) -> None:
    """Python's own http.server, which binds 0.0.0.0, and the real curl."""
    code = (
        "from http.server import *\n"
        "ThreadingHTTPServer.request_queue_size = 60\n"  # of 5 a kernel drops some, and tries again seconds later
        "s = ThreadingHTTPServer(('', 8000), SimpleHTTPRequestHandler)\n"
        "print('ready', flush=True)\n"
        "s.serve_forever()"
    )
    await vm.exec("mkdir /tmp/www && for n in $(seq 60); do echo page $n >/tmp/www/$n; done")
    async with await vm.spawn(["python3", "-c", code], cwd="/tmp/www") as process:
        await ready(process)
        async with vm.forward(8000) as forward:
            answers = await asyncio.gather(
                *(curl(f"http://{forward}/{number}") for number in range(1, 61))
            )
            await all_ended(vm, 60)

    assert answers == [(f"page {number}\n", 0) for number in range(1, 61)]
    events = [event for event in audit_of(vm) if event["kind"] == "ingress"]
    assert events[0]["reason"] == "listening"
    assert sum(event.get("reason") == "closed" for event in events) == 60
    assert {event["guest_port"] for event in events} == {8000}


# A server of the standard library only, with RFC 6455 by hand: it answers in capitals, pings, and closes when told to.
WEBSOCKET = """
import base64, hashlib, struct
from http.server import *

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.frame(0x89, b"are you there")
        while self.answer(): pass
        self.close_connection = True
    def answer(self):
        kind, length = self.rfile.read(2)
        size = length & 127
        if size > 125: size = int.from_bytes(self.rfile.read(2 if size == 126 else 8), "big")
        mask, data = self.rfile.read(4), self.rfile.read(size)
        whole = (mask * (size // 4 + 1))[:size]
        plain = (int.from_bytes(data, "big") ^ int.from_bytes(whole, "big")).to_bytes(size, "big")
        self.frame(0x8A if kind == 0x89 else kind, plain.upper() if kind & 15 < 8 else plain)
        return kind != 0x88
    def frame(self, kind, data):
        size = len(data)
        head = bytes([kind, size]) if size < 126 else bytes([kind, 127]) + struct.pack(">Q", size)
        self.wfile.write(head + data)
    def log_message(self, *arguments): pass

s = ThreadingHTTPServer(("", 8000), Handler)
print("ready", flush=True)
s.serve_forever()
"""


async def websocket_send(writer: asyncio.StreamWriter, kind: int, data: bytes) -> None:
    """Send one frame as a client does: masked (RFC 6455, 5.2)."""
    mask = os.urandom(4)
    whole = int.from_bytes((mask * (len(data) // 4 + 1))[: len(data)])
    masked = (int.from_bytes(data) ^ whole).to_bytes(len(data))
    size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xff" + len(data).to_bytes(8)
    writer.write(bytes([kind]) + size + mask + masked)
    await writer.drain()


async def websocket_receive(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    kind, size = await reader.readexactly(2)
    if size == 127:
        size = int.from_bytes(await reader.readexactly(8))
    return kind, await reader.readexactly(size)


async def websocket_open(forward: Forward) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Shake hands, and check the server's answer to a key of our own."""
    key = base64.b64encode(os.urandom(16))
    reader, writer = await asyncio.open_connection(forward.host, forward.port)
    writer.write(
        b"GET /chat HTTP/1.1\r\nHost: %b\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: %b\r\nSec-WebSocket-Version: 13\r\n\r\n" % (str(forward).encode(), key)
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"Sec-WebSocket-Accept: " + acceptance_of(key) + b"\r\n" in head
    return reader, writer


async def test_a_websocket_carries_messages_of_both_sides_until_it_is_closed(vm: Sandbox) -> None:
    """Two at once to a server in the guest: text, a megabyte, a ping from each side, and the closing handshake."""
    large = os.urandom(1 << 20)
    async with await vm.spawn(["python3", "-c", WEBSOCKET]) as process:
        await ready(process)
        async with vm.forward(8000) as forward, asyncio.timeout(PATIENCE_S):
            idle_reader, idle_writer = await websocket_open(forward)
            reader, writer = await websocket_open(forward)
            received = [await websocket_receive(reader)]
            for kind, data in [
                (0x81, b"hello"),
                (0x82, large),
                (0x89, b"ping"),
                (0x88, b"\x03\xe8"),
            ]:
                await websocket_send(writer, kind, data)
                received.append(await websocket_receive(reader))
            rest = await reader.read()
            await websocket_send(idle_writer, 0x81, b"still here")
            idle = [await websocket_receive(idle_reader) for _ in range(2)]
            writer.close()
            idle_writer.close()

    assert received == [
        (0x89, b"are you there"),
        (0x81, b"HELLO"),
        (0x82, large.upper()),
        (0x8A, b"ping"),
        (0x88, b"\x03\xe8"),
    ]
    assert rest == b""
    assert idle[1] == (0x81, b"STILL HERE")


async def test_an_upload_is_whole_and_its_end_leaves_the_answer_open(vm: Sandbox) -> None:
    """20 MB in, the client's FIN, and only then does the server say what it got."""
    data = os.urandom(MEGABYTES << 20)
    async with serving(vm, DIGEST) as forward:
        reader, writer = await asyncio.open_connection(forward.host, forward.port)
        writer.write(data)
        await writer.drain()
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read()
        writer.close()

    assert answer.decode() == hashlib.sha256(data).hexdigest()


async def test_a_download_is_whole_and_its_end_leaves_the_client_talking(vm: Sandbox) -> None:
    """20 MB out, the server's FIN, and what the client says after it still arrives."""
    async with serving(vm, SOURCE) as forward:
        reader, writer = await asyncio.open_connection(forward.host, forward.port)
        async with asyncio.timeout(PATIENCE_S):
            data = await reader.read()
        writer.write(b"still here")
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            while not (late := (await vm.exec("cat /tmp/late 2>/dev/null")).stdout):
                await asyncio.sleep(0.1)
        writer.close()

    assert data == bytes(range(256)) * (4096 * MEGABYTES)
    assert late == "still here"


async def test_a_server_that_does_not_read_stops_its_client_and_nobody_else(vm: Sandbox) -> None:
    """Of 64 MB no more than windows and kernel buffers are taken; another connection is served meanwhile."""
    body = "if c.recv(1) == b's': threading.Event().wait()\nc.sendall(b'ok')\nc.close()"
    async with serving(vm, body) as forward, asyncio.timeout(PATIENCE_S):
        with socket.create_connection((forward.host, forward.port)) as stuck:
            stuck.sendall(b"s")
            stuck.settimeout(1.0)
            taken = 0
            with contextlib.suppress(TimeoutError):
                while taken < 64 << 20:
                    taken += await asyncio.to_thread(stuck.send, bytes(1 << 16))
            reader, writer = await asyncio.open_connection(forward.host, forward.port)
            writer.write(b"x")
            answer = await reader.read()
            writer.close()

    assert answer == b"ok"
    assert taken < 16 << 20


async def test_two_hundred_connections_are_open_at_once(vm: Sandbox) -> None:
    """Each has its own bytes back, while all the others are open."""
    async with serving(vm, ECHO) as forward, asyncio.timeout(PATIENCE_S):
        clients = [await asyncio.open_connection(forward.host, forward.port) for _ in range(200)]
        for number, (_, writer) in enumerate(clients):
            writer.write(b"%04d" % number)
        answers = [await reader.readexactly(4) for reader, _ in clients]
        for _, writer in clients:
            writer.close()

    assert answers == [b"%04d" % number for number in range(200)]


async def test_a_server_that_listens_on_ipv6_only_is_reached(vm: Sandbox) -> None:
    async with serving(vm, ECHO, host="::1", family="AF_INET6") as forward:
        reader, writer = await asyncio.open_connection(forward.host, forward.port)
        writer.write(b"over ::1")
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.readexactly(8)
        writer.close()

    assert answer == b"over ::1"


async def test_a_port_that_nobody_listens_on_is_broken_off_promptly(vm: Sandbox) -> None:
    """curl fails at once, and a server that starts later is reached at the same address."""
    async with vm.forward(7000) as forward, asyncio.timeout(PATIENCE_S):
        _, early = await curl(f"http://{forward}/")
        async with serving(vm, ECHO):
            reader, writer = await asyncio.open_connection(forward.host, forward.port)
            writer.write(b"now")
            answer = await reader.readexactly(3)
            writer.close()

    assert early in RESET
    assert answer == b"now"
    assert any("Connection refused" in str(event.get("reason")) for event in audit_of(vm))


async def test_a_server_that_dies_breaks_its_clients_off(vm: Sandbox) -> None:
    """A connection that the guest's kernel resets is reset here: no end that would pass for a whole answer."""
    body = (
        "import struct\nc.recv(1)\n"
        "c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\nc.close()"
    )
    async with serving(vm, body) as forward, asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(forward.host, forward.port)
        writer.write(b"x")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_a_connection_wakes_a_paused_guest() -> None:
    """It is answered, here refused, within the seconds that a pause may take to notice; it does not hang."""
    async with Sandbox.create(**GUEST, idle_pause_s=0.2) as vm, vm.forward(7000) as forward:
        await until(lambda: vm.statistics().paused)
        _, status = await curl(f"http://{forward}/")

    assert status in RESET


async def test_a_closed_sandbox_leaves_no_connection_and_no_listener() -> None:
    async with Sandbox.create(**GUEST) as vm:
        forward = await vm.forward(22)  # never closed by hand
        async with serving(vm, ECHO) as echo:
            reader, writer = await asyncio.open_connection(echo.host, echo.port)
            writer.write(b"x")
            await reader.readexactly(1)
            await vm.close()
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(ConnectionResetError):
                    await reader.read()
            writer.close()
        with pytest.raises(SandboxStateError):
            vm.forward(7000)

    for address in (forward, echo):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address.host, address.port)).close()


async def test_a_lost_sandbox_leaves_no_connection_and_no_listener(vm: Sandbox) -> None:
    """The machine is killed behind our back."""
    forward = await vm.forward(7000, host_port=0)
    os.kill(vm.host_pid, signal.SIGKILL)
    await until(lambda: vm.state != "running")

    await until(lambda: refused(forward))


def test_a_blocking_program_forwards_a_port_too() -> None:
    """taskvm.sync.forward: the connections are carried while the program's own thread is busy."""
    indented = "\n".join("    " + line for line in ECHO.splitlines())
    code = SERVER.format(body=indented, host="127.0.0.1", family="AF_INET")
    with BlockingSandbox.create(**GUEST) as vm, vm.spawn(["python3", "-c", code]) as process:
        assert process.stdout.read() == b"ready\n"
        with (
            vm.forward(7000) as forward,
            socket.create_connection((forward.host, forward.port), timeout=PATIENCE_S) as client,
        ):
            client.sendall(b"hello")
            answer = client.recv(5, socket.MSG_WAITALL)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((forward.host, forward.port)).close()

    assert answer == b"hello"
    assert str(forward) == f"127.0.0.1:{forward.port}"


@pytest.fixture
def a_port_of_ours() -> Iterator[int]:
    """A port that the kernel gives to nobody else, and that a server with SO_REUSEADDR, as they have it, can take."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_the_command_line_publishes_ports_and_says_where(a_port_of_ours: int) -> None:
    """--publish GUEST_PORT takes a free port, HOST_PORT:GUEST_PORT the one that is asked for."""
    taskvm = [str(Path(sys.executable).with_name("taskvm")), "run", "--cpus", "1"]
    arguments = [
        "--memory",
        "256",
        "-q",
        "--publish",
        "8000",
        "--publish",
        f"{a_port_of_ours}:8000",
    ]
    code = (
        "import socket\ns = socket.create_server(('127.0.0.1', 8000))\nprint('ready', flush=True)\n"
        "for _ in range(2): c = s.accept()[0]; c.sendall(b'hello'); c.close()"
    )
    process = subprocess.Popen(
        [*taskvm, *arguments, "--", "python3", "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stderr.readline(), process.stderr.readline()]
        assert process.stdout.readline() == "ready\n"
        answers = []
        for line in lines:
            host, _, port = line.split()[-1].rpartition(":")
            with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as client:
                answers.append(client.recv(5, socket.MSG_WAITALL))

    assert answers == [b"hello"] * 2
    assert lines[1] == f"taskvm: port 8000 of the guest is at 127.0.0.1:{a_port_of_ours}\n"
    assert process.returncode == 0


@pytest.mark.parametrize("text", ["http", "1:2:3", "99999", "0", ":80", "-1:80"])
def test_a_wrong_publish_is_one_line_and_status_2(text: str) -> None:
    taskvm = str(Path(sys.executable).with_name("taskvm"))
    done = subprocess.run(
        [taskvm, "run", "--cpus", "1", "--memory", "256", "-q", f"--publish={text}", "--", "true"],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
