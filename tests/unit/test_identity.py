"""What a fork is told to be."""

import base64
import re
from pathlib import Path

from taskvm.identity import (
    CA_BUNDLE,
    GuestUser,
    account_request,
    guest_environment,
    identity_request,
    trust_requests,
)

CERTIFICATE = (
    b"-----BEGIN CERTIFICATE-----\n"
    + base64.b64encode(b"the certificate")
    + b"\n-----END CERTIFICATE-----\n"
)


def test_the_guest_trusts_this_sandboxs_authority_alone() -> None:
    """The bundle that every client is pointed at holds one certificate: everything is intercepted."""
    request = identity_request(
        hostname="sandbox-1",
        machine_id="0" * 32,
        ca_certificate=CERTIFICATE,
        entropy=b"e" * 64,
        time_ns=5,
    )
    files = {item.path: item.data for item in request.files}

    assert files[b"/run/taskvm/ca.crt"] == CERTIFICATE
    assert b"the certificate" in files[b"/run/taskvm/cacerts"]
    assert guest_environment(GuestUser(uid=0, gid=0))["SSL_CERT_FILE"] == CA_BUNDLE


def test_what_makes_a_guest_itself_lies_in_memory_alone() -> None:
    """Names, trust and machine id are not on the disk that a checkpoint would keep."""
    request = identity_request(
        hostname="h", machine_id="0" * 32, ca_certificate=b"", entropy=b"e" * 64, time_ns=5
    )

    assert all(item.path.startswith(b"/run/taskvm/") for item in request.files)


def test_an_ordinary_user_carries_the_hosts_numbers() -> None:
    """The account is added to the image's own, not written over them."""
    user = GuestUser(uid=1234, gid=99)
    request = account_request(user, hostname="h", entropy=b"e" * 64, time_ns=5)
    added = {item.path: item for item in request.files}

    assert all(item.append for item in request.files)
    assert added[b"/etc/passwd"].data == b"user:x:1234:99::/home/user:/bin/bash\n"
    assert added[b"/etc/group"].data == b"user:x:99:\n"


def test_openssl_is_told_what_an_emulated_cpu_is_fast_at() -> None:
    """ChaCha20 first everywhere; without its vector code only where the CPU is emulated."""
    request = identity_request(
        hostname="h", machine_id="0" * 32, ca_certificate=b"", entropy=b"e" * 64, time_ns=5
    )
    user = GuestUser(uid=0, gid=0)
    emulated = guest_environment(user, emulated_x86=True)

    path = emulated["OPENSSL_CONF"].encode()
    assert b"Ciphersuites = TLS_CHACHA20" in {f.path: f.data for f in request.files}[path]
    assert emulated["OPENSSL_ia32cap"] == "~0x1000020000000000:~0x20"
    assert "OPENSSL_ia32cap" not in guest_environment(user)


def test_a_wider_trust_is_written_in_pieces_that_a_frame_holds() -> None:
    bundle = CERTIFICATE * 2000
    requests = list(
        trust_requests(bundle, hostname="h", random_bytes=bytes, time_ns=lambda: 5_000_000)
    )
    written: dict[bytes, bytes] = {}
    for request in requests:
        (file,) = request.files
        assert len(file.data) <= 32 * 1024
        assert file.append == (file.path in written)
        written[file.path] = written.get(file.path, b"") + file.data

    assert written[b"/run/taskvm/ca.crt"] == bundle
    assert written[b"/run/taskvm/cacerts"].count(b"the certificate") == 2000


def test_programs_that_carry_their_own_list_are_told_of_the_authority() -> None:
    """Each variable that the page of protocols names."""
    page = Path(__file__).parent.parent.parent / "docs" / "protocols.md"
    (table,) = re.findall(r"how it trusts the authority.*?\n\n", page.read_text(), re.DOTALL)
    named = set(re.findall(r"`([A-Z_]{8,})`", table))
    environment = guest_environment(GuestUser(uid=1000, gid=1000))

    assert {"DENO_CERT", "SSL_CERT_FILE"} < named
    assert {environment.get(name) for name in named} == {"/etc/ssl/certs/ca-certificates.crt"}


def test_the_environment_names_the_user() -> None:
    """HOME and USER fit the account."""
    environment = guest_environment(GuestUser(uid=1000, gid=1000))

    assert (environment["HOME"], environment["USER"]) == ("/home/user", "user")
