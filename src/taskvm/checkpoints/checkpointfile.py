"""A checkpoint on disk: what it says of itself, and why it is believed.

    NAME                        a disk checkpoint: one file, in the user's store without a suffix
    NAME/disk.qcow2             a memory checkpoint: the disk, the same kind of file,
         ram, state                  the guest's memory and its devices,
         memory.json                 what they fit and what the host must know (0600: it holds a key)

A disk's file is a qcow2 layer above its image, and behind its clusters `Facts` as JSON, their length (u32, big-endian)
and MAGIC. It names no other file: QEMU is told what lies beneath, and everything before the facts has a digest in them.

Rule 1: a disk may come from anywhere; it is opened when its head is plain (`taskvm.wire.qcow2`) and its digest right.
Rule 2: memory is believed only with this user's own seal (an HMAC): a machine's saved state is a program for QEMU.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import shutil
import stat
import struct
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from taskvm.checkpoints.carried import Carried
from taskvm.errors import CheckpointError, HostError
from taskvm.paths import cache_dir, private_dir, replace_file, state_dir, sync_directory
from taskvm.vm.command import MachineShape
from taskvm.vm.disk import check_layer
from taskvm.vm.template import FileMark, GuestFiles, TemplateInputs, mark_file
from taskvm.wire.qcow2 import MAX_HEAD_BYTES, parse_header

MAGIC = b"TASKVMC1"
# Some hundreds of bytes; what is larger is not ours.
MAX_FACTS_BYTES = 64 * 1024
# The host's side of a guest: 65 000 names of 253 bytes (32 MiB) are the most there can be, and up to 400 bytes for each
# file of a mount that its kernel remembers.
MAX_MEMORY_JSON_BYTES = 256 * 1024 * 1024
# Of a guest's memory; they are believed as long as nobody has touched them. The disk is believed for its digest.
MEMORY_FILES = ("ram", "state")
_TAIL = struct.Struct(">I8s")
_SEAL_CONTEXT = b"taskvm memory checkpoint 1\0"
_KEY_BYTES = 32

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Word = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z._+:-]{1,80}\Z")]


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a disk was made of, and when."""

    image: Digest
    arch: Word
    cpus: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    memory_mib: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    qemu_version: Word
    created: Word


class Facts(Description, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a disk's file says of itself. `disk_bytes` come before the facts, and `sha256` is their digest."""

    disk_bytes: Annotated[int, msgspec.Meta(ge=1)]
    sha256: Digest


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a memory checkpoint's state fits, its files as they were written, the digest of its disk, and what the host
    must know.
    """

    inputs: TemplateInputs
    files: dict[str, FileMark]
    disk: Digest
    carried: Carried

    def check(self, path: Path, here: TemplateInputs) -> None:
        """Raise CheckpointError unless a machine of this host, which is `here`, can load the state."""
        theirs, ours = msgspec.to_builtins(self.inputs), msgspec.to_builtins(here)
        differing = [
            f"{name} was {theirs[name]} and is {ours[name]}"
            for name in theirs
            if theirs[name] != ours[name]
        ]
        if differing:
            raise _refused(
                path,
                f"its memory fits another machine: {'; '.join(differing)}",
                f"Its disk may be used, without its programs: {path / 'disk.qcow2'}",
            )


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was read: where it is, and what it says. `memory` is None for a disk's."""

    path: Path
    facts: Facts
    memory: Memory | None = None

    @property
    def disk(self) -> Path:
        """The file of its disk."""
        return self.path / "disk.qcow2" if self.memory is not None else self.path

    @property
    def key(self) -> str:
        """A digest that names this disk at this place: two checkpoints may be equal."""
        return hashlib.sha256(
            self.facts.sha256.encode() + os.fsencode(self.disk.absolute())
        ).hexdigest()

    def above(self, guest: GuestFiles, disk: Path) -> GuestFiles:
        """Return what a guest boots from that has this disk, which is at `disk`, above the image of `guest`."""
        return replace(guest, layers=(disk,), checkpoint=self.facts.sha256)


# Reading.


def read_checkpoint(path: Path) -> Saved:
    """Return the checkpoint at `path`, checked as far as that takes no time. Raises CheckpointError."""
    if not path.is_dir():
        return Saved(path=path, facts=read_facts(path))
    facts = read_facts(path / "disk.qcow2")
    memory = _read_memory(path)
    check_memory(path, facts, memory)
    return Saved(path=path, facts=facts, memory=memory)


def check_memory(path: Path, facts: Facts, memory: Memory) -> None:
    """Raise CheckpointError unless what is at `path` is what `memory` was sealed with."""
    changed = [name for name in MEMORY_FILES if memory.files.get(name) != _mark(path / name)]
    if memory.disk != facts.sha256:
        changed.append("disk.qcow2")
    if changed:
        raise _refused(
            path,
            f"its file {changed[0]} was changed, or is a copy",
            "Make a new one: memory is not moved",
        )


def verify_checkpoint(saved: Saved, *, note: bool = True) -> FileMark:
    """Read the whole disk once, and compare its digest; with `note` again only when the file was touched.

    Returns what tells the file as it was read. Raises CheckpointError, or HostError for tables that are not plain.
    """
    with _opened(saved.disk) as file:
        mark = mark_file(file.fileno())
        if note and _is_noted(saved, mark):
            return mark
        found = _digest(file, saved.facts.disk_bytes)
        check_layer(saved.disk, file)
        same = mark_file(file.fileno()) == mark
    if found != saved.facts.sha256 or not same:
        raise _refused(
            saved.path, "its content is not what it was when it was made", "Do not use it"
        )
    if note:
        note_verified(saved, mark)
    return mark


def note_verified(saved: Saved, mark: FileMark) -> None:
    """Remember that the disk, as long as `mark` tells it, has the content that its facts say."""
    with contextlib.suppress(HostError):  # else it is read once more
        replace_file(_note(saved), _identity(saved, mark))


def _is_noted(saved: Saved, mark: FileMark) -> bool:
    try:
        return _note(saved).read_bytes() == _identity(saved, mark)
    except OSError:
        return False


def _note(saved: Saved) -> Path:
    return private_dir(cache_dir() / "verified") / f"{saved.key}.json"


def _identity(saved: Saved, mark: FileMark) -> bytes:
    return msgspec.json.encode([str(saved.disk.absolute()), mark])


def read_facts(path: Path) -> Facts:
    """Return what the file of a disk says of itself. Raises CheckpointError."""
    try:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            facts = _decode_facts(file, size)
            file.seek(0)
            header = parse_header(file.read(MAX_HEAD_BYTES), facts.disk_bytes)
    except (ValueError, OSError) as error:  # msgspec's and qcow2's errors are ValueErrors
        raise _refused(path, str(error)) from error
    if header.names_backing:
        raise _refused(path, "it names a file beneath it", "A checkpoint's disk names none")
    return facts


def _decode_facts(file: BinaryIO, size: int) -> Facts:
    if size < _TAIL.size:
        raise ValueError("it is empty or torn")
    file.seek(size - _TAIL.size)
    length, magic = _TAIL.unpack(file.read(_TAIL.size))
    if magic != MAGIC:
        raise ValueError("it does not end like a checkpoint")
    if not 0 < length <= min(MAX_FACTS_BYTES, size - _TAIL.size):
        raise ValueError(f"its facts have {length} bytes")
    file.seek(size - _TAIL.size - length)
    facts = msgspec.json.decode(file.read(length), type=Facts)
    if facts.disk_bytes != size - _TAIL.size - length:
        raise ValueError("it has another length than it says")
    return facts


def _opened(path: Path) -> BinaryIO:
    """Open a regular file for reading; another kind, such as a FIFO, would block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refused(path, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


def _mark(path: Path) -> FileMark:
    try:
        return mark_file(path)
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error


def _digest(file: BinaryIO, length: int) -> str:
    digest = hashlib.sha256()
    while length and (data := file.read(min(length, 1 << 20))):
        digest.update(data)
        length -= len(data)
    return digest.hexdigest()


def _refused(path: Path, cause: str, next_step: str = "") -> CheckpointError:
    return CheckpointError(f"use the checkpoint {path}", cause, next_step)


# Writing.


def describe(image: str, shape: MachineShape, qemu_version: str) -> Description:
    """Return the description of a disk that is saved now."""
    return Description(
        image=image,
        arch=shape.arch,
        cpus=shape.cpus,
        memory_mib=shape.memory_mib,
        qemu_version=qemu_version,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def copy_disk(source: Path, target: Path) -> None:
    """Copy the file of a disk; it is on the disk when this returns."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def write_facts(path: Path, description: Description) -> None:
    """Write behind the flattened disk `path` what it is; it is on the disk, and read-only, when this returns."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        known = {name: getattr(description, name) for name in Description.__struct_fields__}
        text = msgspec.json.encode(Facts(**known, disk_bytes=size, sha256=_digest(file, size)))
        file.seek(size)
        file.write(text + _TAIL.pack(len(text), MAGIC))
        file.flush()
        os.fchmod(file.fileno(), 0o400)
        os.fsync(file.fileno())


def write_memory(path: Path, inputs: TemplateInputs, carried: Carried) -> None:
    """Seal the files in the directory `path` and write `memory.json`. Raises CheckpointError for too many nodes."""
    files = {}
    for name in MEMORY_FILES:
        with (path / name).open("rb") as file:
            os.fchmod(file.fileno(), 0o400)
            os.fsync(file.fileno())
        files[name] = mark_file(path / name)
    digest = read_facts(path / "disk.qcow2").sha256
    text = msgspec.json.encode(Memory(inputs=inputs, files=files, disk=digest, carried=carried))
    if len(text) >= MAX_MEMORY_JSON_BYTES - _KEY_BYTES * 2:
        raise CheckpointError(
            "save the memory of a sandbox",
            f"its kernel remembers more files of its mounts than {MAX_MEMORY_JSON_BYTES >> 20} MiB describe",
            "Let root in it write 2 to /proc/sys/vm/drop_caches, or save its disk alone",
        )
    replace_file(path / "memory.json", seal(text).encode() + b"\n" + text)
    sync_directory(path)


# Seals.


def seal(text: bytes) -> str:
    """Return this user's seal of `text`."""
    return hmac.new(_seal_key(), _SEAL_CONTEXT + text, hashlib.sha256).hexdigest()


def _read_memory(path: Path) -> Memory:
    with _opened(path / "memory.json") as file:
        content = file.read(MAX_MEMORY_JSON_BYTES)
    written, _, text = content.partition(b"\n")
    if not hmac.compare_digest(written, seal(text).encode()):
        raise _refused(
            path,
            "its memory does not have this user's seal: it was changed, or comes from somebody else",
            f"Its disk may be used: {path / 'disk.qcow2'}",
        )
    try:
        return msgspec.json.decode(text, type=Memory)
    except msgspec.MsgspecError as error:
        raise _refused(path, f"another version of taskvm wrote it ({error})") from error


def _seal_key() -> bytes:
    """Return the key of this user's seals, made at first; nobody else can read it."""
    path = state_dir() / "seal.key"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # two that make it at once make one
        key = os.read(descriptor, _KEY_BYTES)
        if len(key) != _KEY_BYTES:
            key = os.urandom(_KEY_BYTES)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, key, 0)
            os.fsync(descriptor)
        return key
    finally:
        os.close(descriptor)
