"""What makes a freshly forked guest this sandbox and no other: names, user, trust, entropy, time.

Pure: the values come in, the request for the agent comes out.
"""

from __future__ import annotations

import os
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from taskvm.wire.control import IdentityFile, IdentityRequest
from taskvm.wire.keystore import render_keystore

USER_NAME = "user"
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
CA_FILE = "/run/taskvm/ca.crt"  # where the agent has made CA_BUNDLE a link to
JAVA_FILE = "/run/taskvm/cacerts"  # and /etc/ssl/certs/java/cacerts, which Debian's Java reads
_PIECE = 32 * 1024
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----([^-]+)-----END CERTIFICATE-----")
OPENSSL_CONFIG_PATH = "/run/taskvm/openssl.cnf"
# The gateway takes the client's first choice. Without KVM, ChaCha20 in plain integer code is three to four times as
# fast as AES-GCM (185 and 45 MB/s); with it, both are faster than what serves them.
OPENSSL_CONFIG = b"""\
openssl_conf = taskvm
[taskvm]
ssl_conf = taskvm_ssl
[taskvm_ssl]
system_default = taskvm_tls
[taskvm_tls]
Ciphersuites = TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384
"""
# Bits 41 (SSSE3), 60 (AVX) and 64 + 5 (AVX2) off: OpenSSL's vector code for ChaCha20 is what an emulated CPU is slow
# at (60 MB/s); its AES, SHA and elliptic curves are as fast without. OPENSSL_ia32cap(3).
OPENSSL_EMULATED_CPU = "~0x1000020000000000:~0x20"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENTROPY_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestUser:
    """The guest's ordinary user. It carries the host user's numbers, so that files of a mount belong to it on
    both sides.
    """

    uid: int
    gid: int

    @property
    def name(self) -> str:
        return "root" if self.uid == 0 else USER_NAME

    @property
    def home(self) -> str:
        return "/root" if self.uid == 0 else f"/home/{USER_NAME}"


def host_user() -> GuestUser:
    """Return the guest's user for the user that runs this program."""
    return GuestUser(uid=os.getuid(), gid=os.getgid())


def refresh_request(*, hostname: str, entropy: bytes, time_ns: int) -> IdentityRequest:
    """Return the request that only brings time and entropy up to date."""
    return IdentityRequest(time_ns=time_ns, entropy=entropy, hostname=hostname)


def account_request(
    user: GuestUser, *, hostname: str, entropy: bytes, time_ns: int
) -> IdentityRequest:
    """Return the request that adds `user` to the guest's accounts; root is there already.

    It is part of a template: the numbers are the same for every sandbox of one host user.
    """
    account = f"{user.name}:x:{user.uid}:{user.gid}::{user.home}:/bin/bash\n"
    group = f"{user.name}:x:{user.gid}:\n"
    files = [
        IdentityFile(path=path, data=line.encode(), append=True)
        for path, line in ((b"/etc/passwd", account), (b"/etc/group", group))
    ]
    return IdentityRequest(time_ns=time_ns, entropy=entropy, hostname=hostname, files=files)


def identity_request(
    *, hostname: str, machine_id: str, ca_certificate: bytes, entropy: bytes, time_ns: int
) -> IdentityRequest:
    """Return the request that the agent carries out after every resume, before anything of the user's runs.

    `machine_id` is 32 hexadecimal digits (machine-id(5)). The guest trusts `ca_certificate` alone: every connection
    is intercepted, and loading the usual 140 roots costs a guest without KVM a second per process. The agent has
    linked /etc/hostname and the others to these files in memory (guest/boot.c).
    """
    hosts = f"127.0.0.1 localhost {hostname}\n::1 localhost\n"
    files = [
        IdentityFile(path=b"/run/taskvm/hostname", data=f"{hostname}\n".encode()),
        IdentityFile(path=b"/run/taskvm/machine-id", data=f"{machine_id}\n".encode(), mode=0o444),
        IdentityFile(path=b"/run/taskvm/hosts", data=hosts.encode()),
        IdentityFile(path=CA_FILE.encode(), data=ca_certificate),
        IdentityFile(path=JAVA_FILE.encode(), data=_java_store(ca_certificate, time_ns)),
        IdentityFile(path=OPENSSL_CONFIG_PATH.encode(), data=OPENSSL_CONFIG),
    ]
    return IdentityRequest(time_ns=time_ns, entropy=entropy, hostname=hostname, files=files)


def trust_requests(
    bundle: bytes,
    *,
    hostname: str,
    random_bytes: Callable[[int], bytes],
    time_ns: Callable[[], int],
) -> Iterator[IdentityRequest]:
    """Yield the requests that replace what the guest trusts: certificates, PEM, in pieces that a frame holds."""
    for path, data in ((CA_FILE, bundle), (JAVA_FILE, _java_store(bundle, time_ns()))):
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            file = IdentityFile(path=path.encode(), data=piece, append=start > 0)
            yield IdentityRequest(
                time_ns=time_ns(), entropy=random_bytes(ENTROPY_BYTES), hostname=hostname,
                files=[file],
            )  # fmt: skip


def _java_store(bundle: bytes, time_ns: int) -> bytes:
    found = _CERTIFICATE.findall(bundle)
    return render_keystore([b64decode(text) for text in found], time_ns // 1_000_000)


def guest_environment(user: GuestUser, *, emulated_x86: bool = False) -> dict[str, str]:
    """Return the variables that every command in the guest starts with."""
    trust = (
        "SSL_CERT_FILE",
        "CURL_CA_BUNDLE",
        "REQUESTS_CA_BUNDLE",
        "PIP_CERT",
        "GIT_SSL_CAINFO",
        "NODE_EXTRA_CA_CERTS",
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
        # Programs that carry their own list, and read it from here before or besides that.
        "AWS_CA_BUNDLE",
        "CARGO_HTTP_CAINFO",
        "DENO_CERT",
    )
    return {
        "PATH": SEARCH_PATH,
        "HOME": user.home,
        "USER": user.name,
        "LOGNAME": user.name,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        **dict.fromkeys(trust, CA_BUNDLE),
        "OPENSSL_CONF": OPENSSL_CONFIG_PATH,
        **({"OPENSSL_ia32cap": OPENSSL_EMULATED_CPU} if emulated_x86 else {}),
    }
