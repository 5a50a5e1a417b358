"""What the host keeps of a saved guest's mounts (taskvm.checkpoints.carried)."""

from pathlib import Path

import msgspec
import pytest

from taskvm import HostDir, Shadow
from taskvm.checkpoints.carried import CarriedMount
from taskvm.fs.hostpaths import Seen
from taskvm.review.mounted import ReviewMount


def test_a_review_is_the_same_after_json(tmp_path: Path) -> None:
    """Also with a name that is not UTF-8; the copies of one saved guest do not share what each applies."""
    provider = Shadow(HostDir(tmp_path, mode="review"), [".env"])
    applied = {"caf\udce9": Seen(0o100644, 3, 1 << 63, 1_700_000_000_000_000_000)}
    review = ReviewMount.of(1, "/workspace", provider)
    assert review is not None
    review.applied.update(applied)
    mount = CarriedMount.of(provider, b"\0state", review)

    read = msgspec.json.decode(msgspec.json.encode(mount), type=CarriedMount)
    one, two = (read.dated(ReviewMount.of(1, "/workspace", provider) or review) for _ in range(2))
    one.applied.clear()

    assert (read.mode, read.state) == ("review", b"\0state")
    assert (two.since_ns, two.applied) == (review.since_ns, applied)


def test_a_mount_of_no_known_mode_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="mode"):
        msgspec.json.decode(b'{"mode": "rw", "state": ""}', type=CarriedMount)
