"""Servers that real programs talk to: files over HTTPS, git's smart HTTP, a WebSocket that echoes, gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import os
import ssl
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from tests.support.egress_lab import SERVER_CA
from tests.support.h2_lab import Call
from tests.support.tcp import tcp_server

from taskvm.wire.websocket import acceptance_of


def server_context(*names: str) -> ssl.SSLContext:
    """A server's context for these names, signed by SERVER_CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    SERVER_CA.issue_cert(*names).configure_cert(context)
    return context


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if ".git/" in self.path:
            self._run_git()
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self._run_git()

    def _run_git(self) -> None:
        """Let git's own program answer (git-http-backend(1))."""
        path, _, query = self.path.partition("?")
        environment = {
            **os.environ,
            "GIT_PROJECT_ROOT": self.directory,
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_USER": "guest",
        }
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = subprocess.run(
            ["git", "http-backend"], input=body, env=environment, capture_output=True, check=True
        ).stdout
        head, _, content = answer.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def file_server(folder: Path, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve the files of a folder, and the git repositories in it, on 127.0.0.1; yield the port."""
    handler = functools.partial(_Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that leave early
    if context is not None:
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.asynccontextmanager
async def websocket_server(context: ssl.SSLContext) -> AsyncIterator[int]:
    """Echo each message of a WebSocket, in capitals; yield the port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.strip().split(b"\r\n")[1:])
            key = {name.lower(): value for name, value in fields.items()}[b"sec-websocket-key"]
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + acceptance_of(key) + b"\r\n\r\n"
            )
            while True:  # RFC 6455 section 5.2, for messages of less than 126 bytes
                kind, length = await reader.readexactly(2)
                mask = await reader.readexactly(4)
                data = await reader.readexactly(length & 0x7F)
                plain = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
                writer.write(bytes([kind, len(plain)]) + (plain.upper() if kind == 0x81 else plain))
                if kind == 0x88:
                    break

    async with tcp_server(serve, ssl=context) as port:
        yield port


def grpc_echo(call: Call, ended: bool) -> None:
    """Answer a gRPC call with its own message in capitals; /lab.Echo/Fail answers with a status."""
    if not ended:
        return
    if call.path == "/lab.Echo/Fail":
        call.head(
            200, end=True, content_type="application/grpc", grpc_status="5", grpc_message="no"
        )
        return
    message = call.seen.body[5:].upper()
    call.head(200, content_type="application/grpc")
    call.data(struct.pack(">BI", 0, len(message)) + message)
    call.trailers(grpc_status="0")
