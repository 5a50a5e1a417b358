"""The sandbox's own authority: strict enough for the strictest client, and for this sandbox only."""

from __future__ import annotations

import ipaddress
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from taskvm.net import certs
from taskvm.net.certs import CertificateAuthority


def handshake(
    ca: CertificateAuthority, host: str, trusted: bytes, **client: object
) -> ssl.SSLObject:
    """Let a strict client meet our server in memory; return the client."""
    context = ssl.create_default_context(cadata=trusted.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for name, value in client.items():
        setattr(context, name, value)
    context.set_alpn_protocols(["h2", "http/1.1"])
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = context.wrap_bio(down, up, server_hostname=host)
    server = ca.server_context(host).wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (peer, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return peer


@pytest.mark.parametrize(
    "host", ["api.test", "10.0.0.1", "2001:db8::1", "a." * 120 + "test", "_x.test"]
)
def test_a_strict_client_trusts_every_kind_of_host(host: str) -> None:
    ca = CertificateAuthority.create()

    client = handshake(ca, host, ca.certificate_pem)

    assert client.version() == "TLSv1.3"
    assert client.selected_alpn_protocol() == "h2"


def test_an_old_client_gets_tls_1_2_and_nothing_older() -> None:
    ca = CertificateAuthority.create()

    old = handshake(ca, "a.test", ca.certificate_pem, maximum_version=ssl.TLSVersion.TLSv1_2)

    assert old.version() == "TLSv1.2"
    assert ca.server_context("a.test").minimum_version is ssl.TLSVersion.TLSv1_2


def test_another_sandboxs_authority_is_not_trusted() -> None:
    ours, theirs = CertificateAuthority.create(), CertificateAuthority.create()

    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(ours, "api.test", theirs.certificate_pem)


def test_the_certificate_is_an_authority_that_signs_no_other() -> None:
    certificate = x509.load_pem_x509_certificate(CertificateAuthority.create().certificate_pem)

    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)

    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature


def test_the_openssl_command_verifies_strictly(tmp_path: Path) -> None:
    ca = CertificateAuthority.create()
    client = handshake(ca, "api.test", ca.certificate_pem)
    leaf = client.getpeercert(binary_form=True)
    assert leaf is not None
    (tmp_path / "ca.pem").write_bytes(ca.certificate_pem)
    (tmp_path / "leaf.pem").write_text(ssl.DER_cert_to_PEM_cert(leaf))

    result = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "api.test",
         "-CAfile", "ca.pem", "leaf.pem"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert result.stdout == "leaf.pem: OK\n", result.stderr


def test_contexts_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certs, "MAX_CONTEXTS", 2)
    ca = CertificateAuthority.create()
    first = ca.server_context("a.test")
    ca.server_context("b.test")

    assert ca.server_context("a.test") is first
    ca.server_context("c.test")
    assert ca.server_context("a.test") is first
    assert len(ca._contexts) == 2


def test_a_literals_certificate_names_the_address() -> None:
    ca = CertificateAuthority.create()
    leaf = handshake(ca, "10.0.0.1", ca.certificate_pem).getpeercert(binary_form=True)
    assert leaf is not None

    names = x509.load_der_x509_certificate(leaf).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )

    assert list(names.value) == [x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]
