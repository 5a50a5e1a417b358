"""`taskvm image verify | rm | prune` beside sandboxes that run and start (taskvm.cache), judged by the files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.waiting import PATIENCE_S

from taskvm import Cache, ImageError, ImageSpec, ImageStore, Sandbox
from taskvm.paths import cache_path

pytestmark = pytest.mark.vm

TASKVM = str(Path(sys.executable).with_name("taskvm"))


def silent(_line: str) -> None:
    """Progress nobody reads."""


def image_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [TASKVM, "image", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageStore:
    """A store of its own with the default image in it, by hard links."""
    ImageStore().ensure(ImageSpec(), print)
    for name in ("images", "refs"):
        shutil.copytree(cache_path() / name, tmp_path / name, copy_function=os.link)
    tmp_path.chmod(0o700)
    monkeypatch.setenv("TASKVM_CACHE", str(tmp_path))
    return ImageStore()


async def test_what_a_running_sandbox_uses_is_not_removed(store: ImageStore) -> None:
    """Neither rm nor prune takes its image or template; it goes on; afterwards both are freed, and a start says so."""
    async with Sandbox.create(**GUEST) as vm:
        (template,) = (path for path in (store.root / "templates").iterdir() if path.is_dir())
        with pytest.raises(ImageError, match="a running sandbox uses it"):
            list(Cache().remove("default", silent))
        (store.root / "refs" / "default").unlink()
        list(Cache().prune(0, silent))
        kept = template.is_dir(), store.digests() != []
        said = (await vm.exec("echo alive")).stdout

    list(Cache().prune(0, silent))

    assert (said, kept) == ("alive\n", (True, True))
    assert not template.exists()
    assert not any((store.root / "templates").glob("*/"))
    assert "default" not in store.refs()


def test_the_commands_say_what_they_found_and_freed(store: ImageStore) -> None:
    """verify reads the files, rm names what went and its size, prune finds nothing more, list is shorter."""
    digest = store.get("default").digest
    verified = image_command("verify", "default")
    removed = image_command("rm", "default")
    pruned = image_command("prune", "--keep", "9")

    assert (verified.stdout, verified.returncode) == (
        f"ok       {digest[:12]}  {verified.stdout.split()[2]} files\n",
        0,
    )
    assert removed.stdout.startswith(f"removed image {digest[:12]} (default")
    assert "MiB\nfreed" in removed.stdout
    assert pruned.stdout == "freed 0.0 MiB\n"
    assert digest not in store.digests()
    assert image_command("rm", "default").returncode == 125


def test_verify_names_the_damage_and_fails(store: ImageStore) -> None:
    """A file of the right size with another byte in it."""
    kernel = store.get("default").kernel
    content = bytearray(kernel.read_bytes())
    content[-1] ^= 1
    kernel.unlink()  # a link to the real one
    kernel.write_bytes(content)

    done = image_command("verify")

    assert done.returncode == 1
    assert "DAMAGED" in done.stdout
    assert "vmlinuz" in done.stdout
