"""taskvm.image, for real: the default image of this host's store, looked at from outside."""

import pytest

from taskvm.image.kernel import GUEST_MODULES
from taskvm.image.manifest import Image, ImageSpec
from taskvm.image.store import ImageStore
from taskvm.image.tools import run_tool


@pytest.fixture(scope="module")
def image() -> Image:
    """The default image; built here when there is none."""
    return ImageStore().ensure(ImageSpec(), print)


def look(image: Image, path: str) -> str:
    """Return the text of a file of the image, without mounting it."""
    return run_tool(f"read {path}", ["debugfs", "-R", f"cat {path}", str(image.rootfs)])


def test_its_files_are_what_its_manifest_says(image: Image) -> None:
    ImageStore().verify(image)


def test_its_file_system_is_sound(image: Image) -> None:
    run_tool("check", ["e2fsck", "-fn", str(image.rootfs)])


def test_every_module_is_there_or_built_in_and_dependencies_come_first(image: Image) -> None:
    names = [path.stem.partition("-")[2] for path in image.modules]

    assert set(names) <= set(GUEST_MODULES)
    assert names.index("virtio_ring") < names.index("virtio") < names.index("virtio_console")
    assert names.index("nf_conntrack") < names.index("nf_nat") < names.index("nft_chain_nat")


@pytest.mark.parametrize("name", ["workspace", "proc", "sys", "dev", "run", "tmp"])
def test_it_has_the_directories_a_guest_mounts_on(image: Image, name: str) -> None:
    facts = run_tool("look", ["debugfs", "-R", f"stat /{name}", str(image.rootfs)])

    assert "Type: directory" in facts


def test_it_asks_the_agent_for_names_and_knows_nothing_of_the_hosts_resolver(image: Image) -> None:
    assert look(image, "/etc/resolv.conf") == "nameserver 127.0.0.1\n"


def test_nothing_of_the_hosts_apt_configuration_is_in_it(image: Image) -> None:
    listing = run_tool("look", ["debugfs", "-R", "ls -p /etc/apt/apt.conf.d", str(image.rootfs)])

    names = {line.split("/")[5] for line in listing.splitlines() if line}
    assert names == {".", "..", "01autoremove", "70debconf", "90taskvm"}
    assert "@" not in look(image, "/etc/apt/sources.list.d/debian.sources")


def test_no_two_guests_share_a_machine_id_of_the_image(image: Image) -> None:
    assert look(image, "/etc/machine-id") == ""


def test_packages_that_link_their_manual_can_be_installed(image: Image) -> None:
    """The scripts of openjdk and postgresql fail where the directory is missing; its pages are left out."""
    facts = run_tool("look", ["debugfs", "-R", "stat /usr/share/man/man1", str(image.rootfs)])

    assert "Type: directory" in facts
