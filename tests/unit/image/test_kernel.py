"""taskvm.image.kernel: vmlinuz and the modules of a real .deb, each module after what it depends on."""

import gzip
import lzma
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.errors import ImageError
from taskvm.image import kernel
from taskvm.image.kernel import load_order, parse_depends, unpack_kernel

RELEASE = "6.1.0-1-cloud-amd64"


def module(*depends: str) -> bytes:
    """Return the part of a module that is read: its .modinfo strings."""
    return b"\x7fELF\0license=GPL\0depends=%s\0retpoline=Y\0" % ",".join(depends).encode()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree of a kernel package with three modules and one that is built in."""
    monkeypatch.setattr(kernel, "GUEST_MODULES", ("virtio_pci", "ext4", "nft_redir"))
    modules = tmp_path / "package" / "lib" / "modules" / RELEASE
    (modules / "kernel").mkdir(parents=True)
    (modules / "kernel" / "virtio_pci.ko.xz").write_bytes(lzma.compress(module("virtio-ring")))
    (modules / "kernel" / "virtio-ring.ko.gz").write_bytes(gzip.compress(module()))
    (modules / "kernel" / "nft_redir.ko").write_bytes(module())
    (modules / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    package = tmp_path / "package"
    (package / "boot").mkdir()
    (package / "boot" / f"vmlinuz-{RELEASE}").write_bytes(b"kernel")
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN" / "control").write_text(
        "Package: linux-image-test\nVersion: 1\nArchitecture: all\nMaintainer: t <t@t>\nDescription: t\n"
    )
    return package


def pack(tree: Path) -> Path:
    """Make a .deb of a tree."""
    package = tree.parent / "kernel.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(package)]
    subprocess.run(command, check=True, capture_output=True)
    return package


def test_modules_are_decompressed_and_numbered_in_load_order(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()

    release = unpack_kernel(pack(tree), tmp_path / "scratch", target)

    assert release == RELEASE
    assert (target / "vmlinuz").read_bytes() == b"kernel"
    assert {path.name: path.read_bytes() for path in (target / "modules").iterdir()} == {
        "00-virtio_ring.ko": module(),
        "01-virtio_pci.ko": module("virtio-ring"),
        "02-nft_redir.ko": module(),
    }


def test_a_module_that_is_nowhere_is_an_error_that_names_it(tree: Path, tmp_path: Path) -> None:
    (tree / "lib" / "modules" / RELEASE / "kernel" / "virtio-ring.ko.gz").unlink()

    with pytest.raises(ImageError, match="virtio_pci <- virtio_ring"):
        unpack_kernel(pack(tree), tmp_path / "scratch", tmp_path)


def test_a_package_without_a_kernel_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "boot" / f"vmlinuz-{RELEASE}").unlink()

    with pytest.raises(ImageError, match="0 kernels"):
        unpack_kernel(pack(tree), tmp_path / "scratch", tmp_path)


@given(st.lists(st.lists(st.integers(0, 30), max_size=5), max_size=30), st.randoms())
def test_every_module_comes_once_and_after_its_dependencies(edges, random) -> None:  # type: ignore[no-untyped-def]  # hypothesis
    graph = {str(n): [str(to) for to in each if to < n] for n, each in enumerate(edges)}
    wanted = list(graph)
    random.shuffle(wanted)

    order = load_order(wanted, graph, graph.__getitem__)

    assert sorted(order) == sorted(graph)
    place = {name: position for position, name in enumerate(order)}
    assert all(place[to] < place[name] for name, targets in graph.items() for to in targets)


def test_a_circle_of_modules_is_an_error() -> None:
    graph = {"a": ["b"], "b": ["a"]}

    with pytest.raises(ImageError, match="depend on each other"):
        load_order(["a"], graph, graph.__getitem__)


@pytest.mark.parametrize(
    ("contents", "names"),
    [
        (module("nf-tables", "nf_nat"), ["nf_tables", "nf_nat"]),
        (module(), []),
        (b"", []),
    ],
)
def test_dependencies_are_read_from_modinfo(contents: bytes, names: list[str]) -> None:
    assert parse_depends(contents) == names
