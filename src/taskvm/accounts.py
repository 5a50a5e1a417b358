"""The guest's accounts: whom a command may run as, looked up in the guest's own /etc/passwd and /etc/group.

The files are the guest's, and so not trusted: a line that is none is no account, and numbers are bounded. What a name
means decides nothing on the host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from taskvm.errors import GuestError, UsageError
from taskvm.files import Files

# setgroups(2) takes more, the guest's agent takes these.
MAX_GROUPS = 64
MAX_FILE_BYTES = 1024 * 1024
# (uid_t)-1 means "leave it" to setresuid(2).
_MAX_ID = 2**32 - 2
_NUMBERS = re.compile(r"(\d{1,10}):(\d{1,10})\Z", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whom a command runs as. `groups` has the account's own first; `name` and `home` are what the guest says."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that say who one is."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}


class Accounts:
    """The accounts of one guest, as they are when somebody asks: its programs may change them."""

    def __init__(self, files: Files) -> None:
        self._files = files

    async def find(self, user: str) -> Account:
        """Return the account of a name, or of numbers like "1000:1000", which need none.

        Raises UsageError for a name that the guest does not know.
        """
        if numbers := _NUMBERS.match(user):
            return _numbered(user, int(numbers[1]), int(numbers[2]))
        passwd, group = await self._read("/etc/passwd"), await self._read("/etc/group")
        found = parse_accounts(passwd, group).get(user)
        if found is None:
            raise UsageError(
                f"run a command as {user!r}",
                "the guest has no such account",
                'Use a name of its /etc/passwd, "root", or numbers like "1000:1000"',
            )
        return found

    async def start_dir(self, account: Account) -> str:
        """Return where its commands start: its home, or / when that is not there (nobody's is not)."""
        try:
            return account.home if (await self._files.stat(account.home)).is_dir else "/"
        except GuestError:
            return "/"

    async def _read(self, path: str) -> str:
        try:
            content = await self._files.read_bytes(path, length=MAX_FILE_BYTES)
        except GuestError:
            return ""
        return content.decode("utf-8", "replace")


def parse_accounts(passwd: str, group: str) -> dict[str, Account]:
    """Return the accounts of passwd(5) with their groups of group(5), by name; of two lines the first counts."""
    members: dict[str, list[int]] = {}
    for name, _, number, users in _records(group, 4):
        gid = _number(number)
        for user in users.split(",") if name and gid is not None else ():
            members.setdefault(user, []).append(int(number))
    accounts: dict[str, Account] = {}
    for name, _, user_number, group_number, _, home, _ in _records(passwd, 7):
        uid, gid = _number(user_number), _number(group_number)
        if (
            not name
            or uid is None
            or gid is None
            or not home.startswith("/")
            or "\0" in name + home
        ):
            continue
        groups = tuple(dict.fromkeys((gid, *members.get(name, ()))))[:MAX_GROUPS]
        account = Account(uid=uid, gid=gid, groups=groups, name=name, home=home)
        accounts.setdefault(name, account)
    return accounts


def _records(text: str, fields: int) -> list[list[str]]:
    records = [line.split(":") for line in text.split("\n")]
    return [record for record in records if len(record) == fields]


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    number = int(text)
    return number if number <= _MAX_ID else None


def _numbered(user: str, uid: int, gid: int) -> Account:
    if max(uid, gid) > _MAX_ID:
        raise UsageError(f"run a command as {user!r}", f"a number is at most {_MAX_ID}")
    return Account(uid=uid, gid=gid, groups=(gid,), name=str(uid), home="/")
