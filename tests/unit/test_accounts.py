"""The guest's account files as the host reads them (taskvm.accounts)."""

from hypothesis import given
from hypothesis import strategies as st

from taskvm.accounts import MAX_GROUPS, parse_accounts

PASSWD = "root:x:0:0:root:/root:/bin/bash\nbuild:x:1234:77::/home/build:/bin/sh\n"
GROUP = "root:x:0:\ndocker:x:300:other,build\nbuilders:x:77:build\naudio:x:29:build\n"


def test_an_account_has_its_numbers_and_all_its_groups() -> None:
    """Its own group is first and occurs once."""
    account = parse_accounts(PASSWD, GROUP)["build"]

    assert (account.uid, account.gid, account.groups) == (1234, 77, (77, 300, 29))
    assert account.environment == {"HOME": "/home/build", "USER": "build", "LOGNAME": "build"}


def test_the_first_line_of_a_name_counts() -> None:
    """As getpwnam(3) reads the file."""
    accounts = parse_accounts(PASSWD + "build:x:0:0::/root:/bin/sh\n", GROUP)

    assert accounts["build"].uid == 1234


def test_a_number_that_means_leave_it_is_no_account() -> None:
    """4294967295 would keep root's number in setresuid(2); so would what is no number."""
    lines = "a:x:4294967295:0::/:\nb:x:-1:0::/:\nc:x:٣:0::/:\nd:x:0:99999999999::/:\ne:x:1:1::rel:\n:x:1:1::/:\n"

    assert parse_accounts(lines, "") == {}


@given(st.text(), st.text())
def test_any_text_is_read_without_an_error(passwd: str, group: str) -> None:
    """The files are the guest's: whatever they hold, accounts have bounded numbers and groups."""
    for account in parse_accounts(passwd, group).values():
        assert 0 <= account.uid < 2**32 - 1
        assert len(account.groups) <= MAX_GROUPS
