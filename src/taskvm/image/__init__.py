"""Guest images: kernel, modules and root file system, built from Debian's packages and named by digest."""

from __future__ import annotations

from taskvm.image.boot import BootFiles, boot_files
from taskvm.image.manifest import Asset, Image, ImageSpec, Manifest
from taskvm.image.store import ImageStore, build_image

__all__ = [
    "Asset",
    "BootFiles",
    "Image",
    "ImageSpec",
    "ImageStore",
    "Manifest",
    "boot_files",
    "build_image",
]
