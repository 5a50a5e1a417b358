"""What the gateway costs: curl in the guest, and the same curl on the host straight to the server.

    python benchmarks/egress.py [--mib 64] [--requests 100] [--runs 3]

One JSON object. For each of http, https (HTTP/1.1) and h2 (HTTP/2): a body of so many MiB in MB/s, and so many small
requests on one connection in requests a second (`h2`: at once); `direct` is the host's own figure. CPU is the
gateway's (this process) and QEMU's, for each request and each MB. Wall times include curl's own start in the guest;
`start_s` is that alone, `rate` has it taken off. `reference` is what another sandbox of this kind reached on such a
machine without KVM, `reach` what this one is to reach there; null is what that one did not speak. Servers run in a
process of their own. Compare figures of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import trustme

from taskvm import Sandbox

HOST = "api.test"
CHUNK = bytes(64 * 1024)
MB = 1_000_000
# Kind to (reference, reach): MB/s of 64 MiB, and requests/s of 100 small ones by one client. The reference opened a
# connection for each request. Its guest's usual CA bundle made that 1.0 requests/s over https, one certificate 10.8.
BULK = {"http": (11.9, 60.0), "https": (7.0, 30.0), "h2": (None, None)}
SMALL = {"http": (62.0, 150.0), "https": (1.0, 60.0), "h2": (None, 100.0)}


# The servers.


def size_of(target: bytes) -> int:
    """The N of /N?any."""
    return int(target[1:].partition(b"?")[0])


async def serve_http1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """GET /N answers with N bytes."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            left = size_of(head.split(b" ", 2)[1])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % left)
            while left > 0:
                writer.write(CHUNK[:left])
                left -= len(CHUNK)
                await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        writer.close()


class Http2(asyncio.Protocol):
    """The same over HTTP/2."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.left: dict[int, int] = {}
        self.paused = False
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.h2.initiate_connection()
        self.flush()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.pump()

    def data_received(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                path = next(value for name, value in event.headers if name == b":path")
                size = self.left[event.stream_id] = size_of(path)
                fields = [(":status", "200"), ("content-length", str(size))]
                self.h2.send_headers(event.stream_id, fields)
        self.pump()

    def pump(self) -> None:
        for number in list(self.left):
            while not self.paused and number in self.left:
                room = self.h2.local_flow_control_window(number)
                size = min(self.left[number], room, self.h2.max_outbound_frame_size, len(CHUNK))
                if not size and self.left[number]:
                    break
                self.left[number] -= size
                self.h2.send_data(number, CHUNK[:size], end_stream=not self.left[number])
                if not self.left[number]:
                    del self.left[number]
                self.flush()
        self.flush()

    def flush(self) -> None:
        if data := self.h2.data_to_send():
            self.transport.write(data)


def serve(ready: Connection, certificate: str) -> None:
    """Run the servers; send their ports."""

    async def run() -> None:
        def context(*alpn: str) -> ssl.SSLContext:
            made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            made.load_cert_chain(certificate)
            made.set_alpn_protocols(alpn)
            return made

        loop = asyncio.get_running_loop()
        servers = {
            "http": await asyncio.start_server(serve_http1, "127.0.0.1", 0),
            "https": await asyncio.start_server(
                serve_http1, "127.0.0.1", 0, ssl=context("http/1.1")
            ),
            "h2": await loop.create_server(Http2, "127.0.0.1", 0, ssl=context("h2")),
        }
        ready.send({name: server.sockets[0].getsockname()[1] for name, server in servers.items()})
        await asyncio.Event().wait()

    asyncio.run(run())


# The measurements.


def curl(kind: str, port: int, path: str, count: int) -> list[str]:
    """The client: `count` requests over one connection, for HTTP/2 all at once."""
    scheme = "http" if kind == "http" else "https"
    urls = f"{scheme}://{HOST}:{port}{path}" + (f"?[1-{count}]" if count > 1 else "")
    version = ["--http2"] if kind == "h2" else ["--http1.1"]
    at_once = ["--parallel", "--parallel-max", "100"] if kind == "h2" and count > 1 else []
    return ["curl", "-sS", "--fail", *version, *at_once, "-o", "/dev/null", urls]


def beside(figures: tuple[float | None, float | None], unit: str) -> dict[str, float | None]:
    """Return what stands beside a figure of ours."""
    return {f"reference_{unit}": figures[0], f"reach_{unit}": figures[1]}


class Bench:
    """One sandbox, and the ports that it and the host connect to."""

    def __init__(self, vm: Sandbox, ports: dict[str, int], ca: Path, runs: int) -> None:
        self.vm = vm
        self.ports = ports
        self.ca = ca
        self.runs = runs

    async def guest(self, command: list[str]) -> None:
        await self.vm.exec(command, check=True)

    async def host(self, command: list[str]) -> None:
        extra = ["--cacert", str(self.ca), "--connect-to", f"{HOST}::127.0.0.1:"]
        await asyncio.to_thread(subprocess.run, [*command, *extra], check=True)

    async def timed(
        self, run: Callable[[list[str]], Awaitable[None]], command: list[str]
    ) -> dict[str, float]:
        """Medians of the wall clock, the gateway's CPU and QEMU's."""
        rows = []
        for _ in range(self.runs):
            own, emulator, wall = (
                time.process_time(),
                self.vm.statistics().cpu_s,
                time.perf_counter(),
            )
            await run(command)
            rows.append(
                (
                    time.perf_counter() - wall,
                    time.process_time() - own,
                    self.vm.statistics().cpu_s - emulator,
                )
            )
        wall_s, gateway_s, qemu_s = (
            statistics.median(column) for column in zip(*rows, strict=True)
        )
        return {"wall_s": wall_s, "gateway_s": gateway_s, "qemu_s": qemu_s}

    async def bulk(self, kind: str, size_bytes: int) -> dict[str, float | None]:
        command = curl(kind, self.ports[kind], f"/{size_bytes}", 1)
        one = await self.timed(self.guest, curl(kind, self.ports[kind], "/1", 1))
        all_, direct = await self.timed(self.guest, command), await self.timed(self.host, command)
        size = size_bytes / MB
        return {
            "MB_per_s": round(size / (all_["wall_s"] - one["wall_s"]), 1),
            **beside(BULK[kind], "MB_per_s"),
            "direct_MB_per_s": round(size / direct["wall_s"], 1),
            "gateway_ms_per_MB": round(1000 * (all_["gateway_s"] - one["gateway_s"]) / size, 2),
            "qemu_ms_per_MB": round(1000 * (all_["qemu_s"] - one["qemu_s"]) / size, 2),
        }

    async def small(self, kind: str, count: int) -> dict[str, float | None]:
        command = curl(kind, self.ports[kind], "/100", count)
        one = await self.timed(self.guest, curl(kind, self.ports[kind], "/100", 1))
        all_, direct = await self.timed(self.guest, command), await self.timed(self.host, command)
        return {
            "requests_per_s": round(count / all_["wall_s"], 1),
            **beside(SMALL[kind], "requests_per_s"),
            "start_s": round(one["wall_s"], 3),
            "rate": round((count - 1) / (all_["wall_s"] - one["wall_s"]), 1),
            "direct_requests_per_s": round(count / direct["wall_s"], 1),
            "gateway_ms_per_request": round(1000 * all_["gateway_s"] / count, 2),
            "qemu_ms_per_request": round(1000 * all_["qemu_s"] / count, 2),
        }


async def main(size_mib: int, count: int, runs: int, kinds: list[str]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        authority = trustme.CA()
        ca, certificate = Path(folder, "ca.pem"), Path(folder, "server.pem")
        authority.cert_pem.write_to_path(str(ca))
        authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(certificate))
        ready, child = multiprocessing.Pipe()
        servers = multiprocessing.get_context("spawn").Process(
            target=serve, args=(child, str(certificate)), daemon=True
        )
        servers.start()
        ports: dict[str, int] = await asyncio.to_thread(ready.recv)
        options = {
            "allow": [HOST],
            "resolve": {HOST: "127.0.0.1"},
            "allow_addresses": ["127.0.0.1"],
            "extra_ca_files": [ca],
        }
        try:
            async with Sandbox.create(cpus=2, memory_mib=512, **options) as vm:
                bench = Bench(vm, ports, ca, runs)
                await bench.guest(curl("https", ports["https"], "/1", 1))
                return {
                    kind: {
                        "bulk": await bench.bulk(kind, size_mib * 1024 * 1024),
                        "small": await bench.small(kind, count),
                    }
                    for kind in kinds
                }
        finally:
            servers.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["http", "https", "h2"])
    arguments = parser.parse_args()
    figures = asyncio.run(main(arguments.mib, arguments.requests, arguments.runs, arguments.kinds))
    json.dump(figures, sys.stdout, indent=2)
    print()
