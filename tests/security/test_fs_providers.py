"""A hostile kernel in front of composed providers: random requests with guessed nodes, judged by the host's files."""

from __future__ import annotations

import os
import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from tests.security.test_fs_escape import SECRET
from tests.support.hostile_kernel import O_CREAT, O_TRUNC, HostileKernel

from taskvm.fs.hostdir import HostDir
from taskvm.fs.hostfile import HostFile
from taskvm.fs.memory import Memory
from taskvm.fs.provider import Provider
from taskvm.fs.quota import Quota
from taskvm.fs.router import Router
from taskvm.fs.shadow import Shadow
from taskvm.wire.fuse import Opcode

REQUESTS = 4000
NAMES = [b".env", b"keys", b"plain", b"shown", b"covered", b"linked", b"a", b"b"]
HIDDEN = [".env", "/config/keys/", "/*/covered/keys"]


def request(chance: random.Random) -> tuple[int, int, bytes]:
    """One well-formed request on nodes that were given, were forgotten, or never existed."""
    node, other = (chance.randrange(80) for _ in "ab")
    name, new_name = (chance.choice(NAMES) for _ in "ab")
    read = struct.pack("<QQIIQII", 0, 0, 4096, 0, 0, 0, 0)
    written = struct.pack("<QQIIQII", 0, chance.randrange(99), 5, 0, 0, 1, 0) + b"guest"
    copied = struct.pack("<QQQQQQQ", 0, 0, other, 0, 0, 99, 0)
    moved = struct.pack("<QII", other, chance.choice((0, 0, 1, 2)), 0)
    named = name + b"\0"
    return chance.choice(
        (
            (Opcode.LOOKUP, node, named),
            (Opcode.LOOKUP, node, named),
            (Opcode.READ, node, read),
            (Opcode.READDIRPLUS, node, read),
            (Opcode.GETATTR, node, bytes(16)),
            (Opcode.WRITE, node, written),
            (Opcode.COPY_FILE_RANGE, node, copied),
            (Opcode.MKDIR, node, struct.pack("<II", 0o755, 0) + named),
            (Opcode.CREATE, node, struct.pack("<IIII", O_CREAT | O_TRUNC, 0o644, 0, 0) + named),
            (Opcode.SYMLINK, node, named + b"../outside\0"),
            (Opcode.LINK, node, struct.pack("<Q", other) + named),
            (Opcode.RENAME2, node, moved + named + new_name + b"\0"),
            (Opcode.UNLINK, node, named),
            (Opcode.RMDIR, node, named),
        )
    )


@pytest.mark.parametrize("private", [None, Memory(limit_bytes=1 << 20)], ids=["denied", "private"])
@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_of_requests_shows_or_changes_what_is_hidden(
    tmp_path: Path, seed: int, private: Memory | None
) -> None:
    """Forgets are among them, too many at a time; the server answers to the end and holds what its quota allows. What
    the guest puts at hidden names of its own does not come to the host.
    """
    share, chance = tmp_path / "share", random.Random(seed)
    (share / "config" / "keys").mkdir(parents=True)
    (share / "covered").mkdir()
    (share / "config" / "plain").write_text("plain")
    secrets = [share / ".env", share / "config" / "keys" / "a", share / "covered" / "b"]
    for path in (*secrets, tmp_path / "outside"):
        path.write_bytes(SECRET)
    os.link(share / ".env", share / "linked")
    routed = Router({"/": HostDir(share), "/covered": Memory()})
    kernel = HostileKernel(
        Quota(Shadow(routed, HIDDEN, private=private), limit_bytes=100_000, limit_files=50)
    )

    told = b""
    for _ in range(REQUESTS):
        if chance.random() < 0.03:
            node = chance.randrange(80)
            kernel.send(kernel.message(Opcode.FORGET, node, struct.pack("<Q", 2**63)))
        told += kernel.ask(*request(chance))[1]

    assert SECRET not in told
    assert len(told) > 1000  # much of it was granted
    assert [path.read_bytes() for path in (*secrets, tmp_path / "outside")] == [SECRET] * 4
    assert kernel.failures == []
    hidden = {path for path in share.rglob("*") if path.name == ".env" or path.match("config/keys")}
    assert hidden == {share / ".env", share / "config" / "keys"}
    grown = [path for path in share.rglob("*") if path.is_file() and path not in secrets]
    assert len(list(share.rglob("*"))) < 60
    assert sum(max(4096, path.lstat().st_blocks * 512) for path in grown) <= 100_000
    kernel.close()


PLAIN = b"plain"
MOVED = [  # where something is shown, where it is hidden, and the file in question
    ("work", "secrets", "file"),
    ("tmp", ".env", ""),
    ("config/a", "config/b", "secret"),
    ("deep/work", "kept/work", "file"),
]


@pytest.mark.parametrize("private", [None, Memory(limit_bytes=1 << 20)], ids=["denied", "private"])
@pytest.mark.parametrize("seed", range(4))
def test_what_the_host_moves_between_shown_and_hidden_names_is_never_shown_when_hidden(
    tmp_path: Path, seed: int, private: Memory | None
) -> None:
    """The guest asks at random, with all that it was ever given; what is secret is so only while it is hidden."""
    chance = random.Random(seed)
    hidden = ["/secrets/", ".env", "/config/b/secret", "/kept/"]
    for shown, _hidden, file in MOVED:
        (tmp_path / shown / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / shown / file).write_bytes(PLAIN)
    (tmp_path / "kept").mkdir()
    served = Shadow(HostDir(tmp_path), hidden, private=private).opened()
    served.changes = lambda _change: None
    names = sorted({part for each in MOVED for path in each for part in path.split("/") if part})
    known, granted = [1], 0

    for _ in range(600):
        if chance.random() < 0.2:
            move(tmp_path, *chance.choice(MOVED))
            for source in served.sources():
                source.ready()
        with suppress(OSError):
            granted += ask(served, chance, known, [name.encode() for name in names])
        for _shown, there, file in MOVED:
            if (tmp_path / there / file).is_file():
                assert (tmp_path / there / file).read_bytes() == SECRET

    assert granted > 50
    served.close()


def move(top: Path, shown: str, hidden: str, file: str) -> None:
    """Move one thing to its other name; its content is secret exactly while it is hidden."""
    if (top / hidden).exists() and not (top / shown).exists():
        (top / hidden / file).write_bytes(PLAIN)
        (top / hidden).rename(top / shown)
    elif (top / shown / file).exists() and not (top / hidden).exists():
        (top / shown).rename(top / hidden)
        (top / hidden / file).write_bytes(SECRET)


def ask(provider: Provider, chance: random.Random, known: list[int], names: list[bytes]) -> bool:
    """Ask for one thing, and say whether it was granted. Raises AssertionError when it was the secret."""
    node, name = chance.choice(known), chance.choice(names)
    match chance.choice(("lookup", "lookup", "read", "read", "write", "list", "create", "unlink")):
        case "lookup":
            known.append(provider.lookup(node, name).node)
        case "read":
            assert provider.read(node, 0, 100) != SECRET
        case "write":
            provider.write(node, 0, memoryview(PLAIN), append=False)
        case "list":
            provider.readdir(node, 0, 4096)
        case "create":
            known.append(provider.create(node, name, 0o644, 0).node)
        case _:
            provider.unlink(chance.choice(known), b"nothing")
    return True


def test_no_sequence_of_requests_reaches_the_neighbours_of_a_file(tmp_path: Path) -> None:
    """The guest has one file of a directory: the others are neither told nor changed, and nothing is added."""
    share, chance = tmp_path / "share", random.Random(0)
    share.mkdir()
    for name in NAMES:
        (share / os.fsdecode(name)).write_bytes(SECRET)
    (share / "plain").write_bytes(b"plain")
    kernel = HostileKernel(HostFile(share / "plain"))

    told, granted = b"", 0
    for _ in range(REQUESTS // 2):
        opcode, node, body = request(chance)
        error, answer = kernel.ask(opcode, chance.choice((1, node)), body)
        granted += error == 0
        told += answer

    assert SECRET not in told
    assert granted > 100  # reads and writes of the file itself
    assert kernel.failures == []
    assert sorted(path.name.encode() for path in share.iterdir()) == sorted(NAMES)
    assert {p.read_bytes() for p in share.iterdir() if p.name != "plain"} == {SECRET}
    kernel.close()
