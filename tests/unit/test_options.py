"""The options of a sandbox: what exists can be started (taskvm.options, taskvm.progress)."""

import typing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from taskvm.checkpoints.checkpointfile import Saved
from taskvm.egress.oversight import Oversight
from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret
from taskvm.errors import UsageError
from taskvm.fs.hostdir import HostDir, Mode
from taskvm.fs.hostfile import HostFile
from taskvm.fs.memory import Memory
from taskvm.fs.provider import Provider
from taskvm.fs.shadow import Shadow
from taskvm.limits import Limits
from taskvm.options import (
    MAX_MOUNTS,
    Machinery,
    ResumeArguments,
    SandboxOptions,
    change_options,
    is_writable_in,
    read_options,
)

NOTHING = Policy.parse()
WRITABLE: tuple[Mode, ...] = ("direct", "review")


@pytest.mark.parametrize(
    "path", ["workspace", "/a/../b", "/a//b", "/a/", "/", "/etc", "/proc", "/usr", "/a\0b"]
)
def test_a_mount_path_is_plain_absolute_and_not_the_systems(path: str) -> None:
    """A mount can neither hide the guest's system nor mean another path than it says."""
    with pytest.raises(UsageError):
        SandboxOptions(policy=NOTHING, mounts={path: Memory()})


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ("src", "Write HostDir('src')"),
        (Path("src"), "Write HostDir('src')"),
        (Memory, "Write HostDir(path), or another"),
    ],
)
def test_what_is_no_provider_is_told_from_a_path(given: object, step: str) -> None:
    with pytest.raises(UsageError) as caught:
        SandboxOptions(
            mounts=typing.cast("dict[str, Provider]", {"/workspace": given}), policy=NOTHING
        )

    assert caught.value.next_step == step


@pytest.mark.parametrize(("name", "value"), [("", "x"), ("A=B", "x"), ("A B", "x"), ("A", "\0")])
def test_a_variable_must_be_one(name: str, value: str) -> None:
    """What the guest's environment cannot hold is refused."""
    with pytest.raises(UsageError):
        SandboxOptions(policy=NOTHING, env={name: value})


def test_a_secret_and_a_variable_do_not_share_a_name() -> None:
    """The placeholder of a secret cannot be covered by a variable; the value is not in the message."""
    secret = Secret.from_value("TOKEN", "canary-0c11", hosts=["a.example"])

    with pytest.raises(UsageError, match="TOKEN") as caught:
        SandboxOptions(policy=Policy.parse(["a.example"]), secrets=[secret], env={"TOKEN": "x"})
    assert "canary-0c11" not in str(caught.value)


def test_too_many_mounts_are_refused() -> None:
    """The number of mounts has a limit."""
    mounts = {f"/m{number}": Memory() for number in range(MAX_MOUNTS + 1)}

    with pytest.raises(UsageError, match=str(MAX_MOUNTS)):
        SandboxOptions(policy=NOTHING, mounts=mounts)


def test_a_single_file_is_writable_and_its_neighbours_are_not(tmp_path: Path) -> None:
    """What may come to a path of the host, through the mount of one file."""
    for name in ("file", "neighbour"):
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to("file")

    assert is_writable_in(HostFile(tmp_path / "file"), tmp_path / "link")
    assert not is_writable_in(HostFile(tmp_path / "file"), tmp_path / "neighbour")
    assert not is_writable_in(HostFile(tmp_path / "file", mode="ro"), tmp_path / "file")


def test_a_guest_cannot_be_given_its_own_audit_log(tmp_path: Path) -> None:
    """A log in a writable mount could be emptied by whom it accuses, by a link that leads there too."""
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (tmp_path / "link").symlink_to(workspace)
    mounts = {"/workspace": HostDir(workspace)}
    for path in (workspace / "audit.jsonl", tmp_path / "link" / "logs" / "audit.jsonl"):
        for provider in (HostDir(workspace), Shadow(HostDir(workspace), ["*.jsonl"])):
            with pytest.raises(UsageError, match="outside of every mount"):
                SandboxOptions(policy=NOTHING, mounts={"/w": provider}, audit_path=path)

    elsewhere = SandboxOptions(policy=NOTHING, mounts=mounts, audit_path=tmp_path / "audit.jsonl")

    assert elsewhere.audit_path == tmp_path / "audit.jsonl"


@pytest.mark.parametrize("variable", ["TASKVM_CACHE", "XDG_STATE_HOME", "HOME"])
def test_a_guest_cannot_write_to_what_sandboxes_start_from_or_to_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Whoever mounts his home would share images, templates, seals and the record with the guest."""
    for other in ("TASKVM_CACHE", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "project").mkdir()

    for mode in WRITABLE:
        with pytest.raises(UsageError, match="what taskvm itself keeps"):
            read_options(Machinery(), mounts={"/workspace": HostDir(tmp_path, mode=mode)})
    for harmless in (HostDir(tmp_path, mode="ro"), HostDir(tmp_path / "project")):
        assert read_options(Machinery(), mounts={"/workspace": harmless})


def test_everything_that_a_fork_is_given_anew_changes_an_option() -> None:
    """What `Sandbox.create` has besides the machine itself; nothing is taken and then forgotten."""
    before = SandboxOptions(policy=Policy.parse(["c.test", "a.test"]))

    unchanged = {
        name
        for name in typing.get_type_hints(ResumeArguments)
        if change_options(before, **{name: GIVEN.get(name, 77)}) == before
    }

    assert unchanged == set()


GIVEN = {
    "mounts": {"/workspace": Memory()},
    "allow": ["d.test"],
    "allow_addresses": ["10.0.0.1"],
    "policy": Policy.parse(["b.test"], []),
    "oversight": Oversight(deadline_s=77.0),
    "secrets": [Secret("TOKEN", value="value-of-a-secret", hosts=["a.test"])],
    "env": {"A": "1"},
    "resolve": {"a.test": "10.0.0.1"},
    "extra_ca_files": ["/ca.pem"],
    "passthrough": ["c.test"],
    "audit_path": "/audit.jsonl",
    "on_progress": print,
}


def test_a_copy_has_the_limits_that_are_not_named() -> None:
    """Those of its original, not the defaults: what bounds an agent bounds its copies."""
    own = Limits(cpu_share=0.5, disk_limit_mib=100, idle_timeout_s=60.0, max_duration_s=10.0)
    options = SandboxOptions(policy=NOTHING, limits=own)

    changed = change_options(options, max_duration_s=20.0, idle_pause_s=0)

    assert changed.limits == replace(own, max_duration_s=20.0, idle_pause_s=0)
    assert change_options(options, env={"A": "1"}).limits == own


@pytest.mark.parametrize("memory", [True, False])
def test_a_checkpoint_brings_its_shape_along(memory: bool) -> None:
    saved = _saved(memory=memory)

    assert Machinery(checkpoint=saved).shape == (3, 2048)
    assert Machinery(checkpoint=saved, cpus=3, memory_mib=2048).shape == (3, 2048)
    assert Machinery(memory_mib=64).shape == (2, 64)


@pytest.mark.parametrize("said", [{"cpus": 1}, {"memory_mib": 512}], ids=str)
def test_what_is_said_of_the_shape_counts_or_is_refused(said: dict[str, int]) -> None:
    """A disk boots in any machine; a saved memory is of one, which was used in silence."""
    expected = (said.get("cpus", 3), said.get("memory_mib", 2048))

    assert Machinery(checkpoint=_saved(memory=False), **said).shape == expected  # type: ignore[arg-type]  # two ints
    with pytest.raises(UsageError, match="of a machine with 3 and 2048.*use its disk"):
        read_options(Machinery(checkpoint=_saved(memory=True), **said))  # type: ignore[arg-type]  # two ints


def _saved(*, memory: bool) -> Saved:
    facts = SimpleNamespace(cpus=3, memory_mib=2048)
    saved = SimpleNamespace(facts=facts, memory=memory or None, path="/saved", disk="/saved/disk")
    return typing.cast("Saved", saved)
