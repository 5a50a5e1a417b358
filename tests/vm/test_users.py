"""Whom commands run as in a real guest (taskvm.accounts)."""

import pytest

from taskvm import Sandbox, UsageError

pytestmark = pytest.mark.vm
BOTH_SURFACES = True


async def test_an_account_is_looked_up_in_the_guest(vm: Sandbox) -> None:
    """A user added by the guest's own tools has its numbers, its groups and its home at once, and those of later."""
    await vm.exec(
        "groupadd -g 4001 extra && useradd -m -u 4000 -G extra builder", user="root", check=True
    )

    result = await vm.exec("id -u; id -Gn; pwd; echo $HOME $USER", user="builder")

    assert result.stdout.splitlines() == [
        "4000",
        "builder extra",
        "/home/builder",
        "/home/builder builder",
    ]

    await vm.exec("groupadd -g 4002 more && usermod -aG more builder", user="root", check=True)
    later = await vm.exec("id -Gn", user="builder")

    assert later.stdout == "builder extra more\n"


async def test_an_account_without_a_home_starts_at_the_root(vm: Sandbox) -> None:
    """Nobody's home does not exist, and that is no error."""
    result = await vm.exec("id -un; pwd", user="nobody")

    assert result.stdout == "nobody\n/\n"


async def test_numbers_need_no_account(vm: Sandbox) -> None:
    """uid:gid is taken as it is, without further groups."""
    result = await vm.exec("id -u; id -G", user="54321:999")

    assert result.stdout == "54321\n999\n"


@pytest.mark.parametrize("user", ["no-such-user", "", "0", "4294967295:0", "a:b", "0:0\n"])
async def test_an_unknown_account_is_a_usage_error(asynchronous_vm: Sandbox, user: str) -> None:
    """Nothing runs, and nothing runs as somebody else."""
    with pytest.raises(UsageError, match="run a command as"):
        await asynchronous_vm.exec(["true"], user=user)
