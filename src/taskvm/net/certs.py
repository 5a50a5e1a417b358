"""The certificate authority of one sandbox, and the TLS contexts that it makes for each host.

Rule 1: the keys are made for this sandbox, and nothing signed here means anything elsewhere. They are in
        memory only, but for the authority's own in a memory checkpoint (`export`): its copies' guests
        trust it.
Rule 2: the certificates satisfy RFC 5280 as OpenSSL's strict mode reads it (Python 3.13's default):
        key identifiers, key usage and criticality are all there.
"""

from __future__ import annotations

import os
import ssl
from collections import OrderedDict
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from taskvm.wire.hostname import parse_address

# A guest's clock may be a day behind until it is set; a sandbox may be kept for a year.
CLOCK_SKEW = timedelta(days=2)
LIFETIME = timedelta(days=700)
MAX_CONTEXTS = 256


class CertificateAuthority:
    """Signs certificates for the names that one guest connects to."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        # One key for all leaves: they are the same server, this gateway. Saves 0.2 ms for each.
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._contexts: OrderedDict[str, ssl.SSLContext] = OrderedDict()

    @classmethod
    def create(cls) -> CertificateAuthority:
        """Make a new authority: a P-256 key and its certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"taskvm {os.urandom(4).hex()}")])
        subject_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(subject_key, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_key), False
            )
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def load(cls, pem: bytes) -> CertificateAuthority:
        """Make the authority again that `export` gave."""
        key = load_pem_private_key(pem, password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey), "it is our own"
        return cls(key, x509.load_pem_x509_certificate(pem))

    def export(self) -> bytes:
        """Return key and certificate as PEM: a secret of the host's."""
        key = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key + self.certificate_pem

    @property
    def certificate_pem(self) -> bytes:
        """The authority's certificate, for the guest's trust store."""
        return self._certificate.public_bytes(Encoding.PEM)

    def server_context(self, host: str) -> ssl.SSLContext:
        """Return a server's TLS context for a canonical host or IP literal; kept for the next use."""
        context = self._contexts.get(host)
        if context is None:
            context = self._contexts[host] = self._make_context(host)
            while len(self._contexts) > MAX_CONTEXTS:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(host)
        return context

    def _make_context(self, host: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2", "http/1.1"])
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
        # The client's order of ciphers: the guest's programs are told what their CPU is fast at.
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        # The leaf alone: the guest has the authority, and need not read it again for each connection.
        _load_in_memory(context, self._leaf_key, self._sign(host))
        return context

    def _sign(self, host: str) -> x509.Certificate:
        address = parse_address(host)
        name = x509.DNSName(host) if address is None else x509.IPAddress(address)
        public_key = self._leaf_key.public_key()
        # The subject is fixed: a common name holds 64 characters, a host name 253 (RFC 5280).
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "taskvm egress")])
        issuer_key = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        return (
            _builder(subject, self._certificate.subject, public_key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
            .add_extension(x509.SubjectAlternativeName([name]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), False
            )
            .sign(self._key, hashes.SHA256())
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _load_in_memory(
    context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
) -> None:
    """Give the context its key; `ssl` reads files only, so through a file that is on no disk."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem += certificate.public_bytes(Encoding.PEM)
    descriptor = os.memfd_create("taskvm-leaf", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
