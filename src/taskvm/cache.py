"""What this user's cache holds besides running sandboxes, and how its disk is freed: images, templates, initramfs, and
the disks of checkpoints that are gone.

Rule 1: whoever uses an image or a template holds its directory (`taskvm.paths.hold`); what is held stays.
Rule 2: everything goes by a rename first: a process that is killed here leaves whole things, or what the next prune
removes.
Rule 3: what a start may be about to use is either kept or missed by that start with an error, never half there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from taskvm.checkpoints.kept import forget_disks
from taskvm.checkpoints.staging import stored_disks
from taskvm.errors import ImageError, TaskvmError
from taskvm.image.boot import BootFiles, boot_files
from taskvm.image.manifest import Image
from taskvm.image.store import ImageStore
from taskvm.paths import Removed, measure
from taskvm.vm.native import guest_binary
from taskvm.vm.stale import remove_templates
from taskvm.vm.template import guest_key

# A start reads its initial file system within seconds; nobody holds it, so a recently used one stays.
_INITRAMFS_AGE_S = 3600

Progress = Callable[[str], None]


class Cache:
    """The cache of this user. Every method blocks, and removes as it is iterated."""

    def __init__(self, store: ImageStore | None = None) -> None:
        self._store = store or ImageStore()

    def remove(self, name_or_digest: str, progress: Progress) -> Iterator[Removed]:
        """Remove an image with all its names, then its templates.

        Raises ImageError when it is not there, or a running sandbox or a checkpoint of the store needs it.
        """
        digest = self._store.digest_of(name_or_digest)
        if above := [name for name, disk in stored_disks().items() if disk.image == digest]:
            raise ImageError(
                f"remove the guest image {name_or_digest!r}",
                f"checkpoints lie above it: {', '.join(above)}; one that is built again is another",
                f"Remove them first: taskvm checkpoint rm {' '.join(above)}",
            )
        doomed: set[str] = set()
        with contextlib.suppress(
            TaskvmError
        ):  # a damaged image is removed without its templates: prune finds them
            doomed.add(_boot_files(self._store.get(name_or_digest)).digest)
        yield self._store.remove(name_or_digest, progress)
        yield from remove_templates(self._store.root / "templates", doomed.__contains__)

    def prune(self, keep: int, progress: Progress) -> Iterator[Removed]:
        """Remove images without a name but the `keep` newest, templates and initial file systems of none that stays.

        An image that a checkpoint of the store lies above stays, as do that checkpoint's templates.
        """
        disks = list(stored_disks().values())
        yield from self._store.prune(keep, progress, spare={disk.image for disk in disks})
        images = dict(self._bootable())
        current = list(images.values())
        digests = {files.digest for files in current} | {
            guest_key(images[disk.image].digest, disk.sha256)
            for disk in disks
            if disk.image in images
        }
        yield from remove_templates(
            self._store.root / "templates", lambda digest: digest not in digests
        )
        yield from forget_disks(self._store.root / "kept")
        yield from self._old_initramfs(
            {name for files in current for name in (files.initrd.name, files.head.name)}
        )

    def _bootable(self) -> Iterator[tuple[str, BootFiles]]:
        for digest in self._store.digests():
            with contextlib.suppress(ImageError):  # damaged, or removed since
                yield digest, _boot_files(self._store.get(digest))

    def _old_initramfs(self, kept: set[str]) -> Iterator[Removed]:
        directory = self._store.root / "initramfs"
        for path in sorted(directory.iterdir()) if directory.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # another was faster
                status = path.stat()
                if path.name not in kept and status.st_mtime < time.time() - _INITRAMFS_AGE_S:
                    size = measure(path)
                    path.unlink()
                    yield Removed(f"initial file system {path.name[:12]}", size)


def _boot_files(image: Image) -> BootFiles:
    return boot_files(image, guest_binary(image.manifest.arch))
