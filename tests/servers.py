"""Real servers on 127.0.0.1 for tests: they write down what reached them, and some must stay silent."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trustme


@dataclass
class Seen:
    """What reached a server: one (method, path, headers, body) for each request."""

    port: int = 0
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


def _handler(seen: Seen) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            seen.requests.append((self.command, self.path, dict(self.headers), body))
            reply = b'{"user": "me"}\n'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - the names http.server looks for

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Nothing on standard error."""

    return Handler


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # More than connect at once in any test: what the kernel drops is sent again after 1, 3 and 7 seconds.
    request_queue_size = 128


@contextlib.contextmanager
def http_server(context: ssl.SSLContext | None = None) -> Iterator[Seen]:
    """Serve on a free port of 127.0.0.1 until the block ends; with `context` over TLS."""
    seen = Seen()
    server = _Server(("127.0.0.1", 0), _handler(seen))
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    seen.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def tls_context(host: str, ca_file: Path) -> ssl.SSLContext:
    """Return a server's context for `host`, and write the authority that signed it to `ca_file`."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    authority.cert_pem.write_to_path(str(ca_file))
    return context
