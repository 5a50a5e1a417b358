"""What a fork is told to be."""

from taskvm.identity import CA_BUNDLE, GuestUser, guest_environment, identity_request


def request(uid: int):  # type: ignore[no-untyped-def]  # a helper of this file
    return identity_request(
        hostname="sandbox-1",
        machine_id="0" * 32,
        user=GuestUser(uid=uid, gid=uid),
        ca_certificate=b"CERT",
        entropy=b"e" * 64,
        time_ns=5,
    )


def test_the_guest_trusts_this_sandboxs_authority_alone() -> None:
    """The bundle holds one certificate: everything is intercepted."""
    files = {item.path.decode(): item for item in request(0).files}

    assert files[CA_BUNDLE].data == b"CERT"
    assert guest_environment(GuestUser(uid=0, gid=0))["SSL_CERT_FILE"] == CA_BUNDLE


def test_an_ordinary_user_carries_the_hosts_numbers() -> None:
    """The account is added, not written over the image's accounts; root needs none."""
    added = {item.path: item for item in request(1234).files if item.append}

    assert added[b"/etc/passwd"].data == b"user:x:1234:1234::/home/user:/bin/bash\n"
    assert not [item for item in request(0).files if item.append]


def test_the_environment_names_the_user() -> None:
    """HOME and USER fit the account."""
    environment = guest_environment(GuestUser(uid=1000, gid=1000))

    assert (environment["HOME"], environment["USER"]) == ("/home/user", "user")
