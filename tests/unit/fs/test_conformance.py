"""taskvm.fs.conformance, which taskvm.testing hands out: ours pass, and each of several wrong ones is found out.

It is made of taskvm.fs.conformance_nodes and taskvm.fs.conformance_contents, on taskvm.fs.conformance_harness.
"""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path

import pytest

from taskvm.fs.hooks import Hooks
from taskvm.fs.hostdir import HostDir
from taskvm.fs.memory import Memory
from taskvm.fs.provider import ROOT, DirEntry, Entry, Node, Provider
from taskvm.fs.quota import Quota
from taskvm.fs.router import Router
from taskvm.fs.shadow import Shadow
from taskvm.fs.tracked import Tracked
from taskvm.fs.wrapper import Wrapper
from taskvm.testing import ProviderConformance


class TestMemory(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return Memory()


class TestHostDir(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return HostDir(directory)


class TestWrapper(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return Wrapper(Wrapper(Memory()))


class TestTracked(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return Tracked(HostDir(directory))


class TestShadowInMemory(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return Shadow(Memory(), [".env", "a/**/b.pem"])


class TestShadowOfADirectory(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return Shadow(HostDir(directory), [".env", "/secrets/", "*.key", "!public.key"])


class TestShadowWithAPrivateLayer(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return Shadow(HostDir(directory), [".env", "target/"], private=Memory())


class TestAPrivateDirectory(ProviderConformance):
    """A hidden directory that the guest made."""

    def make(self, directory: Path) -> Provider:
        return Shadow(HostDir(directory), ["/deep/venv/"], private=Memory())

    def find_root(self) -> Node:
        deep = self.provider.mkdir(ROOT, b"deep", 0o755).node
        return self.provider.mkdir(deep, b"venv", 0o755).node


class TestQuota(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return Quota(HostDir(directory), limit_bytes=1 << 30, limit_files=10_000)


class TestHooks(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        return Hooks(Memory(), before=lambda asked: asked, after=lambda _asked, result: result)


class TestRouter(ProviderConformance):
    """A route, reached through the junctions above it."""

    def make(self, directory: Path) -> Provider:
        return Router({"/": Memory(), "/a/b": HostDir(directory)})

    def find_root(self) -> Node:
        return self.provider.lookup(self.provider.lookup(ROOT, b"a").node, b"b").node


class TestTheRootOfARouter(ProviderConformance):
    """A junction whose provider serves its own path."""

    def make(self, directory: Path) -> Provider:
        return Router({"/": HostDir(directory)})


class TestAllOfThem(ProviderConformance):
    def make(self, directory: Path) -> Provider:
        routed = Router({"/": HostDir(directory)})
        return Hooks(Quota(Shadow(routed, [".env"], private=Memory()), limit_files=9999))


# Wrong ones, each in one respect.


class ListsFromTheStart(Memory):
    def readdir(self, node: Node, offset: int, size: int) -> list[DirEntry]:
        return super().readdir(node, 0, size) if offset < 40 else []


class ForgetsTheUnlinked(Memory):
    def unlink(self, parent: Node, name: bytes) -> None:
        node = self.lookup(parent, name).node
        super().unlink(parent, name)
        self.forget(node, 2)


class NeverForgets(Memory):
    def forget(self, node: Node, count: int) -> None:
        pass


class ReplacesAnyway(Memory):
    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> None:
        super().rename(parent, name, new_parent, new_name, 0)


class ExcludesNobody(Memory):
    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Entry:
        return super().create(parent, name, mode, 0)


class KeepsTheBuffer(Memory):
    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        self.kept = memoryview(data)
        return super().write(node, offset, data, append=append)


class WritesWhereItIsTold(Memory):
    def write(self, node: Node, offset: int, data: memoryview, *, append: bool) -> int:
        return super().write(node, offset, data, append=False)


class ForgetsWhatIsInAFifo(Memory):
    def mknod(self, parent: Node, name: bytes, mode: int) -> Entry:
        return super().mknod(parent, name, stat.S_IFREG | stat.S_IMODE(mode))


class PunchesBeyondItsHole(Memory):
    def allocate(self, node: Node, offset: int, length: int, mode: int) -> None:
        self.write(node, 0, memoryview(bytes(offset + length)), append=False)


class SavesNothing(Memory):
    def export_state(self) -> bytes:
        return Memory().export_state()


class TakesAnything(Memory):
    def import_state(self, state: bytes) -> None:
        with suppress(ValueError):
            super().import_state(state)


class IsOneForAll(Memory):
    def opened(self) -> Memory:
        return self


WRONG = {
    ListsFromTheStart: "test_a_listing_in_pieces_has_every_name_once",
    ForgetsTheUnlinked: "test_an_unlinked_file_lives_until_it_is_forgotten",
    NeverForgets: "test_an_unlinked_file_lives_until_it_is_forgotten",
    ReplacesAnyway: "test_a_rename_heeds_its_flags_or_refuses_them",
    ExcludesNobody: "test_creation_excludes_and_truncates_as_it_is_told",
    KeepsTheBuffer: "test_what_was_written_is_not_held",
    WritesWhereItIsTold: "test_contents_are_padded_appended_and_cut",
    ForgetsWhatIsInAFifo: "test_fifos_and_sockets_are_names_without_contents_or_refused",
    PunchesBeyondItsHole: "test_space_is_reserved_and_freed_as_fallocate_does_or_refused",
    SavesNothing: "test_a_saved_guest_goes_on_with_its_nodes",
    TakesAnything: "test_what_is_no_saved_state_is_said",
    IsOneForAll: "test_two_mounts_have_nothing_to_do_with_each_other",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_provider_is_found_out(wrong: type[Memory]) -> None:
    class Suite(ProviderConformance):
        def make(self, directory: Path) -> Provider:
            return wrong()

    failed = [name for name in dir(Suite) if name.startswith("test_") and not passes(Suite(), name)]

    assert WRONG[wrong] in failed
    assert len(failed) < len([name for name in dir(Suite) if name.startswith("test_")]) / 2


def passes(suite: ProviderConformance, name: str) -> bool:
    suite.setup_method()
    try:
        getattr(suite, name)()
    except (AssertionError, OSError, BufferError):
        return False
    finally:
        suite.teardown_method()
    return True
