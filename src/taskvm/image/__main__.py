"""`python -m taskvm.image`: make sure that the default guest image exists, for set-up scripts."""

from __future__ import annotations

import sys

from taskvm.errors import TaskvmError
from taskvm.image.manifest import ImageSpec
from taskvm.image.store import ImageStore


def main() -> int:
    """Build the default image unless it exists; print where it is."""
    try:
        image = ImageStore().ensure(ImageSpec(), _report)
    except TaskvmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{image.path}\n")
    return 0


def _report(line: str) -> None:
    sys.stderr.write(f"image: {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
