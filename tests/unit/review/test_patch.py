"""Patches that git itself takes, of text and bytes that nobody chose to be easy (taskvm.review.patch)."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvm.review.patch import Version, render_patch

FILE, EXECUTABLE, LINK = 0o100644, 0o100755, 0o120000
# Few different lines, so that they repeat; and some that end without a newline.
TEXTS = st.lists(
    st.sampled_from([b"a\n", b"b\n", b"c\n", b"\n", b"x", b"\xff\r\n"]), max_size=40
).map(b"".join)
BYTES = st.one_of(TEXTS, st.binary(max_size=200), st.binary(max_size=200).map(lambda b: b + b"\0"))
NAMES = st.sampled_from(
    ["plain", "sp ace", "tab\tand\nnewline", 'quo"te', "back\\slash", "umläut", "\udcff"]
)


def versions(content: st.SearchStrategy[bytes]) -> st.SearchStrategy[Version | None]:
    return st.one_of(st.none(), st.builds(Version, st.sampled_from([FILE, EXECUTABLE]), content))


def apply(root: Path, patch: str) -> None:
    environment = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CEILING_DIRECTORIES": str(root.parent),
    }
    subprocess.run(
        ["git", "apply", "--whitespace=nowarn", "-"],
        input=patch.encode("utf-8", "surrogateescape"),
        cwd=root,
        env=environment,
        check=True,
    )


@settings(max_examples=60)
@given(name=NAMES, old=versions(BYTES), new=versions(BYTES))
def test_git_makes_the_new_version_of_the_old(
    tmp_path_factory: pytest.TempPathFactory, name: str, old: Version | None, new: Version | None
) -> None:
    root = tmp_path_factory.mktemp("patch")
    path = root / os.fsdecode(name.encode("utf-8", "surrogateescape"))
    if old is not None and old.content is not None:
        path.write_bytes(old.content)
        path.chmod(old.mode & 0o777)

    patch = render_patch(name, old, new, binary=True)
    if old != new:
        apply(root, patch)

    assert path.exists() is (new is not None)
    if new is not None:
        assert path.read_bytes() == new.content
        assert bool(path.stat().st_mode & 0o100) is (new.mode == EXECUTABLE)


def test_a_small_change_of_a_long_text_is_a_small_patch() -> None:
    lines = [b"line %d\n" % number for number in range(20_000)]
    changed = [*lines[:100], b"new\n", *lines[100:15_000], *lines[15_001:]]

    patch = render_patch(
        "x", Version(FILE, b"".join(lines)), Version(FILE, b"".join(changed)), binary=False
    )

    assert patch.count("\n@@ ") == 2
    assert [line for line in patch.splitlines()[3:] if line[0] in "+-" and line[:3] != "+++"] == [
        "+new",
        "-line 15000",
    ]


def test_texts_made_to_be_slow_are_not() -> None:
    """Half a million lines that all repeat: shown as replaced, at once."""
    old = b"".join(b"%d\n" % (number % 7) for number in range(250_000))
    new = b"".join(b"%d\n" % (number * 3 % 11) for number in range(250_000))
    begun = time.process_time()

    patch = render_patch("x", Version(FILE, old), Version(FILE, new), binary=False)

    assert patch.count("\n") > 400_000
    assert time.process_time() - begun < 20  # difflib alone: hours


def test_a_change_of_type_is_a_deletion_and_a_creation() -> None:
    patch = render_patch("x", Version(FILE, b"text\n"), Version(LINK, b"target"), binary=False)

    assert "deleted file mode 100644" in patch
    assert "new file mode 120000" in patch
    assert "+target\n\\ No newline at end of file\n" in patch


def test_bytes_and_what_is_too_large_are_noted() -> None:
    assert "Binary files a/x and b/x differ" in render_patch(
        "x", Version(FILE, b"\0"), Version(FILE, b"1"), binary=False
    )
    assert "Binary files /dev/null and b/x differ" in render_patch(
        "x", None, Version(FILE, None), binary=True
    )
    assert render_patch("directory", None, None, binary=True) == ""
