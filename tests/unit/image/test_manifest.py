"""taskvm.image.manifest: specifications that can be built, and the digest that names an image."""

import pytest

from taskvm.errors import UsageError
from taskvm.image.manifest import Asset, ImageSpec, compute_digest

ASSETS = {
    "vmlinuz": Asset(sha256="aa", size_bytes=1),
    "rootfs.ext4": Asset(sha256="bb", size_bytes=2),
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"suite": "bookworm main"},
        {"suite": "../etc"},
        {"include": ("git", "--option")},
        {"include": ("vim,curl",)},
        {"arch": "riscv64"},
        {"mirror": "mirror.example/debian"},
        {"mirror": "http://user:password@mirror.example/debian"},
        {"mirror": "http://mirror.example/debian] [trusted=yes"},
        {"size_mib": 1},
    ],
)
def test_what_cannot_be_built_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ImageSpec(**wrong)


def test_the_plain_specification_is_called_default() -> None:
    assert ImageSpec().ref_name == "default"


def test_other_specifications_have_names_of_their_own() -> None:
    names = {
        ImageSpec().ref_name,
        ImageSpec(include=("make",)).ref_name,
        ImageSpec(size_mib=8192).ref_name,
    }

    assert len(names) == 3


def test_the_digest_does_not_depend_on_the_order_of_assets() -> None:
    backwards = dict(reversed(ASSETS.items()))

    assert compute_digest("x86_64", "6.1", ASSETS) == compute_digest("x86_64", "6.1", backwards)


def test_the_digest_changes_with_one_byte_of_one_asset() -> None:
    changed = {**ASSETS, "vmlinuz": Asset(sha256="ab", size_bytes=1)}

    assert compute_digest("x86_64", "6.1", ASSETS) != compute_digest("x86_64", "6.1", changed)
