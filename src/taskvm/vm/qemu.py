"""The host's QEMU: where it is, which version, which machine type. Asked once, remembered by the file's identity."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec

from taskvm.errors import NotInstalledError, UnavailableError
from taskvm.paths import cache_dir, replace_file

INSTALL_HINT = {
    "x86_64": "Install it: apt-get install qemu-system-x86 qemu-utils",
    "aarch64": "Install it: apt-get install qemu-system-arm qemu-utils",
}
_ALIAS = {"x86_64": "q35", "aarch64": "virt"}
_QUESTION_TIMEOUT_S = 30.0


class QemuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What `--version` and `-machine help` said. `identity` names the file they were asked of."""

    identity: str
    version: str
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """One QEMU binary of the host, for one guest architecture."""

    path: Path
    image_tool: Path
    arch: str
    version: str
    machine: str


def host_arch() -> str:
    """Return the host's architecture in the kernel's words: x86_64 or aarch64."""
    machine = platform.machine()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def find_qemu(arch: str) -> Qemu:
    """Return the host's QEMU for guests of `arch`.

    Raises NotInstalledError when QEMU or qemu-img is missing, UnavailableError when it does not answer, or has no
    machine for us.
    """
    path, image_tool = _locate(arch, f"qemu-system-{arch}"), _locate(arch, "qemu-img")
    facts = _remembered(path, arch)
    return Qemu(
        path=path, image_tool=image_tool, arch=arch, version=facts.version, machine=facts.machine
    )


def _locate(arch: str, name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise NotInstalledError(
            f"find {name}",
            "it is not in PATH",
            INSTALL_HINT.get(arch, "Install QEMU for this architecture"),
        )
    return Path(found).resolve()


def _remembered(path: Path, arch: str) -> QemuFacts:
    status = path.stat()
    identity = f"{path}:{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    note = cache_dir() / f"qemu-{arch}.json"
    try:
        facts = msgspec.json.decode(note.read_bytes(), type=QemuFacts)
        if facts.identity == identity:
            return facts
    except (OSError, msgspec.MsgspecError):
        pass
    facts = QemuFacts(
        identity=identity, version=_version(path), machine=_machine_type(path, _ALIAS[arch])
    )
    replace_file(note, msgspec.json.encode(facts))
    return facts


def _version(path: Path) -> str:
    found = re.search(r"version (\d+\.\d+[.\w]*)", _ask(path, "--version"))
    if found is None:
        raise UnavailableError(f"ask {path} for its version", "the answer has no version number")
    return found.group(1)


def _machine_type(path: Path, alias: str) -> str:
    """The versioned type behind `q35` or `virt`: a saved state belongs to it."""
    found = re.search(
        rf"^{alias}\s.*alias of ([\w.-]+)\)", _ask(path, "-machine", "help"), re.MULTILINE
    )
    if found is None:
        raise UnavailableError(
            f"find the machine type {alias} of {path}",
            "`-machine help` does not list it",
            "Install a QEMU built with it (Debian's and Ubuntu's are)",
        )
    return found.group(1)


def _ask(path: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(
            [path, *arguments],
            capture_output=True,
            text=True,
            timeout=_QUESTION_TIMEOUT_S,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(
            f"run {path} {' '.join(arguments)}", str(error), "Reinstall QEMU"
        ) from error
    return answer.stdout
