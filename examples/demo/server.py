"""A real HTTPS server on 127.0.0.1 that wants a bearer token and remembers what it was sent."""

from __future__ import annotations

import datetime as dt
import json
import secrets
import ssl
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAME = "api.demo.test"
RULES = {"rounding": "half up"}
MAX_BODY = 64 * 1024


@dataclass(frozen=True, slots=True)
class Received:
    """One request as the server got it."""

    method: str
    path: str
    authorization: str
    body: str


class DemoServer:
    """Serves until the block is left. `token` is what a caller must present."""

    def __init__(self, directory: Path) -> None:
        self.token = f"sk-demo-{secrets.token_hex(16)}"
        self.received: list[Received] = []
        self.ca_file = directory / "demo-ca.pem"
        context = _tls_context(directory, self.ca_file)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(200 if self._take() else 401, RULES)

            def do_POST(self) -> None:
                self._answer(201 if self._take() else 401, {"thanks": True})

            def _take(self) -> bool:
                length = min(int(self.headers.get("Content-Length", "0")), MAX_BODY)
                body = self.rfile.read(length).decode("utf-8", "replace")
                authorization = self.headers.get("Authorization", "")
                server.received.append(Received(self.command, self.path, authorization, body))
                return secrets.compare_digest(authorization, f"Bearer {server.token}")

            def _answer(self, status: int, content: object) -> None:
                data = json.dumps(content if status < 400 else {"error": "wrong token"}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                """The log is `received`."""

        return Handler


def _tls_context(directory: Path, ca_file: Path) -> ssl.SSLContext:
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Demo CA")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    ca = _certificate(ca_name, ca_key, ca_name, ca_key, is_ca=True)
    leaf = _certificate(name, key, ca_name, ca_key, is_ca=False)
    ca_file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    chain = directory / "demo-server.pem"
    chain.touch(mode=0o600)
    chain.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + leaf.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return context


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_ca: bool,
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if is_ca:
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = builder.add_extension(usage, critical=True)
    else:
        names = x509.SubjectAlternativeName([x509.DNSName(NAME)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
