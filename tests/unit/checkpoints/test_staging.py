"""taskvm.checkpoints.staging: a checkpoint while it is made, beside other processes that make others."""

from pathlib import Path

import pytest

from taskvm import paths
from taskvm.checkpoints.staging import staged, sweep_staged


def test_a_checkpoint_is_made_though_another_process_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is there for an instant before it is held, and looks like what a killed process left."""
    hold, held = paths.hold, []

    def hold_late(path: Path) -> int:
        if not held:
            sweep_staged(tmp_path)
        held.append(path)
        return hold(path)

    monkeypatch.setattr(paths, "hold", hold_late)
    with staged(tmp_path / "mine") as staging:
        sweep_staged(tmp_path)
        stays = staging.is_dir()

    assert stays
    assert len(held) == 2
    assert list(tmp_path.iterdir()) == []
