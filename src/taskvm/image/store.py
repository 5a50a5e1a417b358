"""The images of this user, on disk: built once, named by digest, never half made.

::

    images/<digest>/   manifest.json vmlinuz modules/NN-name.ko rootfs.ext4   immutable
    refs/<name>        the digest that a name stands for
    initramfs/         what taskvm.image.boot puts together
    staging/           one build, while `lock` is held

Rule 1: a build happens in staging/ under an exclusive flock, is fsynced, and appears in images/ by one rename.
Rule 2: whoever holds the lock may remove whatever is in staging/: its builder is gone.
Rule 3: the directory is private (0700): an image decides what every guest runs.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from taskvm.errors import ImageError, UsageError
from taskvm.image.build import BuiltAssets, build_assets
from taskvm.image.manifest import (
    MANIFEST_FORMAT,
    RECIPE,
    SPEC_PREFIX,
    Asset,
    Image,
    ImageSpec,
    Manifest,
    compute_digest,
)
from taskvm.interruption import CHECK_INTERVAL_S, check
from taskvm.paths import Removed, cache_path, measure, remedy_for, replace_file, seized

Progress = Callable[[str], None]
Builder = Callable[[ImageSpec, Path, Progress], BuiltAssets]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LEAST_PREFIX = 12  # of a digest, as people shorten it
# How long programs of a killed build may outlive it: tar took 3 s for the default image, more on a busy machine.
_STRAGGLERS_S = 60.0


class ImageStore:
    """The store in `root`. Safe to use from several processes at once; every method blocks.

    `builder` makes the assets of a specification in a directory: `build_assets`, or a test's.
    """

    def __init__(self, root: Path | None = None, *, builder: Builder = build_assets) -> None:
        self.root: Path = cache_path() if root is None else root
        self._builder = builder

    def ensure(self, spec: ImageSpec, progress: Progress) -> Image:
        """Return the image that `spec` was built into; build it first if it was not, or is damaged or outdated."""
        found = self._find_current(spec, progress)
        if found is not None:
            return found
        with self._locked("build a guest image", progress):
            # Another process may have built it while this one waited.
            return self._find_current(spec, progress) or self._build(spec, progress)

    def build(self, spec: ImageSpec, progress: Progress) -> Image:
        """Build `spec` now, whether or not it was built before, and let its name stand for the result."""
        with self._locked("build a guest image", progress):
            return self._build(spec, progress)

    def get(self, name_or_digest: str) -> Image:
        """Return an image by name, digest or the start of a digest. Raises ImageError when there is none."""
        found = self._find(name_or_digest)
        if found is None:
            known = ", ".join(self.names()) or "none"
            raise ImageError(
                f"find the guest image {name_or_digest!r}",
                f"the store {self.root} does not hold it (names: {known})",
                f"Build it, with the packages it needs: taskvm image build --name {name_or_digest} --include PACKAGE",
            )
        return found

    def list(self) -> list[Image]:
        """Return all images, the newest first."""
        directory = self.root / "images"
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        found = (self._find(name) for name in names if _DIGEST.fullmatch(name))
        images = [image for image in found if image is not None]
        return sorted(images, key=lambda image: image.manifest.created, reverse=True)

    def refs(self) -> dict[str, str]:
        """Return every name and the digest it stands for."""
        directory = self.root / "refs"
        paths = directory.iterdir() if directory.is_dir() else ()
        found = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # its image has just been removed
                if _NAME.fullmatch(path.name):
                    found[path.name] = path.read_text().strip()
        return found

    def names(self) -> tuple[str, ...]:
        """Return the names that people gave; others find what a specification was built into."""
        return tuple(sorted(name for name in self.refs() if not name.startswith(SPEC_PREFIX)))

    def tag(self, image: Image, name: str) -> None:
        """Let `name` stand for `image`."""
        if not _NAME.fullmatch(name) or _DIGEST.fullmatch(name):
            raise UsageError("name a guest image", f"{name!r} does not match {_NAME.pattern}")
        self._make_private()
        replace_file(self.root / "refs" / name, f"{image.digest}\n".encode())

    def remove(self, name_or_digest: str, progress: Progress) -> Removed:
        """Remove an image, damaged or not, and every name of it. Raises ImageError when a running sandbox uses it."""
        with self._locked("remove a guest image", progress):
            removed = self._remove(self.digest_of(name_or_digest))
        if removed is None:
            raise ImageError(
                f"remove the guest image {name_or_digest!r}",
                "a running sandbox uses it",
                "Close the sandbox first",
            )
        return removed

    def prune(
        self, keep: int, progress: Progress, *, spare: Collection[str] = ()
    ) -> Iterator[Removed]:
        """Remove the images without a name, and what builds left behind.

        The `keep` newest stay, those in use, and those whose digest is in `spare`.
        """
        with self._locked("remove guest images", progress):
            left = self.root / "staging"
            if left.exists():
                size = measure(left)
                _remove_left_over(left)
                yield Removed("what an interrupted build left", size)
            named = {*self.refs().values(), *spare}
            paths = [self.root / "images" / name for name in self.digests() if name not in named]
            paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            for path in paths[keep:]:
                removed = self._remove(path.name)
                if removed is not None:
                    yield removed

    def digests(self) -> Sequence[str]:
        """Return the digest of every image, also of one that is damaged."""
        directory = self.root / "images"
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        return sorted(name for name in names if _DIGEST.fullmatch(name))

    def verify(self, image: Image) -> None:
        """Read every asset and compare it with the manifest. Raises ImageError naming the first that differs."""
        for name, asset in image.manifest.assets.items():
            if measure_asset(image.path / name) != asset:
                raise _damaged(image.path, f"{name} is not what the manifest says")

    def digest_of(self, name_or_digest: str) -> str:
        """Return the digest of an image that `get` would find, also when it is damaged. Raises ImageError."""
        digest = self.refs().get(name_or_digest, name_or_digest)
        matches = [found for found in self.digests() if found.startswith(digest)]
        if len(digest) < _LEAST_PREFIX or len(matches) != 1:
            return self.get(name_or_digest).digest  # it says what is wrong
        return matches[0]

    # Removing...

    def _remove(self, digest: str) -> Removed | None:
        """With the lock held: names first, so that none ever leads nowhere; then one rename; then the files."""
        path, trash = self.root / "images" / digest, self.root / "staging"
        with seized(path) as free:
            if not free:
                return None
            names = sorted(name for name, value in self.refs().items() if value == digest)
            for name in names:
                (self.root / "refs" / name).unlink()
            size = measure(path)
            trash.mkdir(mode=0o700, exist_ok=True)
            path.rename(trash / digest)
        _remove_left_over(trash)
        known = f" ({', '.join(names)})" if names else ""
        return Removed(f"image {digest[:_LEAST_PREFIX]}{known}", size)

    # Finding...

    def _find_current(self, spec: ImageSpec, progress: Progress) -> Image | None:
        try:
            found = self._find(spec.ref_name)
        except ImageError as error:
            progress(f"{error.operation}: {error.cause}; building it anew")
            return None
        return found if found is not None and found.manifest.recipe == RECIPE else None

    def _find(self, name_or_digest: str) -> Image | None:
        if not _NAME.fullmatch(name_or_digest):
            raise UsageError("find a guest image", f"{name_or_digest!r} is no name and no digest")
        digest = self.refs().get(name_or_digest, name_or_digest)
        if not _DIGEST.fullmatch(digest):
            matches = [found for found in self.digests() if found.startswith(digest)]
            if len(digest) < _LEAST_PREFIX or len(matches) != 1:
                return None
            digest = matches[0]
        try:
            return self._load(digest)
        except ImageError:
            if (self.root / "images" / digest).is_dir():
                raise
            return None  # it is not there, or no more

    def _load(self, digest: str) -> Image:
        path = self.root / "images" / digest
        try:
            manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
        except (OSError, msgspec.MsgspecError) as error:
            raise _damaged(path, f"manifest.json: {error}") from error
        if manifest.digest != digest or manifest.format != MANIFEST_FORMAT:
            raise _damaged(path, "manifest.json is not of this image, or of another format")
        for name, asset in manifest.assets.items():
            # Sizes are checked at every use, contents by `verify`: hashing 4 GiB takes seconds.
            file = path / name
            if not file.is_file() or file.stat().st_size != asset.size_bytes:
                raise _damaged(path, f"{name} is missing or has another size")
        return Image(path, manifest)

    # Building, with the lock held...

    @contextlib.contextmanager
    def _locked(self, operation: str, progress: Progress) -> Iterator[None]:
        """Hold the lock. What the host refuses inside, such as room on its disk, is an ImageError of `operation`."""
        self._make_private()
        try:
            with (self.root / "lock").open("w") as lock:
                if not _try_lock(lock):
                    progress("another process is building in this store; waiting for it to finish")
                while not _try_lock(lock):
                    check()
                    time.sleep(CHECK_INTERVAL_S)
                yield
        except ConnectionError:
            raise  # whoever read the progress has gone
        except OSError as error:
            place = error.filename or self.root  # write(2) knows no names
            cause = f"{place}: {error.strerror or error}"
            raise ImageError(operation, cause, remedy_for(error)) from error

    def _build(self, spec: ImageSpec, progress: Progress) -> Image:
        staging = self.root / "staging"
        if staging.exists():
            progress("removing what an interrupted build left behind")
            _remove_left_over(staging)
        staging.mkdir(mode=0o700)
        # Never the same path twice: what a killed builder's mmdebstrap still writes must not land in this build.
        new = Path(tempfile.mkdtemp(prefix="build-", dir=staging))
        try:
            built = self._builder(spec, new, progress)
            progress("computing digests")
            manifest = _describe(spec, built, new)
            (new / "manifest.json").write_text(f"{manifest.to_json()}\n", encoding="utf-8")
            image = self._publish(new, manifest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self.tag(image, spec.ref_name)
        progress(f"image {image.digest[:_LEAST_PREFIX]} is ready in {image.path}")
        return image

    def _publish(self, new: Path, manifest: Manifest) -> Image:
        final = self.root / "images" / manifest.digest
        if self._is_sound(manifest.digest):
            # The same bytes: they stay, so that no name leads nowhere for an instant.
            replace_file(final / "manifest.json", f"{manifest.to_json()}\n".encode())
            return self._load(manifest.digest)
        _sync_tree(new)
        if final.exists():
            final.rename(new.with_name("damaged"))  # who has its files open keeps them
        new.rename(final)
        _sync(final.parent)
        return self._load(manifest.digest)

    def _is_sound(self, digest: str) -> bool:
        try:
            image = self._find(digest)
            if image is not None:
                self.verify(image)
        except ImageError:
            return False
        return image is not None

    def _make_private(self) -> None:
        operation, remedy = (
            f"open the image store {self.root}",
            "Set TASKVM_CACHE to a directory of your own",
        )
        try:
            for directory in (self.root, self.root / "images", self.root / "refs"):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.root.stat()
        except OSError as error:
            raise ImageError(operation, error.strerror or str(error), remedy) from error
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise ImageError(operation, "other users can write to it", remedy)


def build_image(spec: ImageSpec, store: ImageStore, progress: Progress) -> Image:
    """Build `spec` into `store` and return the image. Blocks for about a minute."""
    return store.build(spec, progress)


def measure_asset(path: Path) -> Asset:
    """Return the digest and size of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Asset(sha256=digest, size_bytes=path.stat().st_size)


# Assets and files...


def _try_lock(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_left_over(directory: Path) -> None:
    """Remove a build's files. A program of a build that was killed may still add some; it ends by itself."""
    deadline = time.monotonic() + _STRAGGLERS_S
    while directory.exists() and time.monotonic() < deadline:
        check()
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.02)
    if directory.exists():
        shutil.rmtree(directory)  # it says what is in the way


def _describe(spec: ImageSpec, built: BuiltAssets, directory: Path) -> Manifest:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    assets = {str(path.relative_to(directory)): measure_asset(path) for path in paths}
    return Manifest(
        format=MANIFEST_FORMAT,
        recipe=RECIPE,
        digest=compute_digest(spec.arch, built.kernel_release, assets),
        arch=spec.arch,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        spec=spec,
        kernel_release=built.kernel_release,
        packages=built.packages,
        assets=assets,
    )


def _damaged(path: Path, cause: str) -> ImageError:
    return ImageError(
        f"open the guest image {path}", cause, f"Remove it and build it again: rm -r {path}"
    )


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o400)  # nothing may change an image, least of all a template's RAM or disk
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
