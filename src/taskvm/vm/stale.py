"""Templates that no start will use again, and what their killed builders left: found and removed.

A template in use is held by its sandboxes, and one that is being built is locked by its builder; neither is touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from taskvm.paths import Removed, measure, seized
from taskvm.vm.template import LAYOUT, Manifest, building


def remove_templates(base: Path, is_stale: Callable[[str], bool]) -> Iterator[Removed]:
    """Remove the templates in `base` whose guest (a digest of `GuestFiles`) `is_stale`, and those that are broken."""
    for path in sorted(base.iterdir()) if base.is_dir() else ():
        if not path.is_dir():
            continue
        digest = path.name.lstrip(".")
        with building(base, digest) as free:
            # A name with a point is a build: of nobody, when the lock is free.
            if not free or not (path.name.startswith(".") or _is_stale(path, is_stale)):
                continue
            removed = None
            with suppress(FileNotFoundError):  # a builder has just removed it as old
                removed = _remove(path, base / f".{digest}")
        if removed is not None:
            yield removed


def _remove(path: Path, trash: Path) -> Removed | None:
    with seized(path) as free:
        if not free:
            return None
        size = measure(path)
        if path != trash:
            shutil.rmtree(trash, ignore_errors=True)
            path.rename(trash)
    shutil.rmtree(trash)
    return Removed(f"template {trash.name[1:13]}", size)


def _is_stale(path: Path, is_stale: Callable[[str], bool]) -> bool:
    try:
        inputs = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest).inputs
    except (OSError, msgspec.MsgspecError):
        return True
    return inputs.layout != LAYOUT or is_stale(inputs.guest_digest)
