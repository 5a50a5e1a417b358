"""The images of tests, besides the default one. `python -m tests.support.images` builds what is missing, one by one.

Built beforehand, no test's time limit has to hold a minute of package installation beside other tests.
"""

import time

import click

from taskvm import ImageSpec, ImageStore
from taskvm.image.build import runs_programs_of
from taskvm.image.manifest import DEBIAN_ARCHITECTURES
from taskvm.vm.qemu import host_arch

# What real programs need beyond the default image. Keep it small.
PROGRAMS = ImageSpec(
    include=(
        "gcc",
        "git-lfs",  # a client in Go
        "libc6-dev",
        "make",
        "nodejs",
        "npm",
        "python3-grpcio",
        "python3-h2",  # httpx's HTTP/2
        "python3-httpx",
        "python3-pip",
        "python3-pytest",
        "python3-requests",
        "python3-websockets",
        "rsync",
        "sqlite3",
    )
)
OTHER_ARCH = "aarch64" if host_arch() == "x86_64" else "x86_64"
# Whether packages of that processor can be set up here (binfmt_misc).
CAN_BUILD_OTHER = runs_programs_of(DEBIAN_ARCHITECTURES[OTHER_ARCH])


def main() -> None:
    wanted = {"programs": PROGRAMS}
    if CAN_BUILD_OTHER:
        wanted[OTHER_ARCH] = ImageSpec(arch=OTHER_ARCH)
    for name, spec in wanted.items():
        start = time.monotonic()
        image = ImageStore().ensure(spec, click.echo)
        click.echo(f"test image {name}: {image.digest[:12]}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
