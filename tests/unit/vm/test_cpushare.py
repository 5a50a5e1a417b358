"""taskvm.vm.cpushare: which control groups are tried, and that a host without one is an error with its reasons."""

from pathlib import Path

import pytest

from taskvm.errors import HostError
from taskvm.vm import cpushare
from taskvm.vm.cpushare import CpuShare, Place, places


def test_a_delegated_session_is_tried_beside_us_first(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").touch()

    assert list(places("0::/user.slice/app.slice/run.scope\n", tmp_path)) == [
        Place(tmp_path / "user.slice/app.slice", unified=True),
        Place(tmp_path / "user.slice/app.slice/run.scope", unified=True),
    ]


def test_the_older_hierarchy_is_found_by_its_controllers(tmp_path: Path) -> None:
    memberships = "4:memory:/a\n3:cpu,cpuacct:/b\n2:cpuset:/\n0::/\n"

    assert list(places(memberships, tmp_path)) == [
        Place(tmp_path / "cpu,cpuacct" / "b", unified=False),
        Place(tmp_path / "unified", unified=True),
    ]


def test_a_group_is_made_bound_and_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written where, on a directory in place of cgroup v2; what another sandbox left is swept."""
    (tmp_path / "cgroup.subtree_control").write_text("memory cpu")
    (tmp_path / "taskvm-dead").mkdir()
    (tmp_path / "taskvm-alive").mkdir()
    place = Place(tmp_path, unified=True)
    monkeypatch.setattr(cpushare, "places", lambda memberships, mount: [place])

    share = CpuShare.take("new", 0.5, [17], runs=lambda name: name == "alive")

    assert (share.path / "cpu.max").read_text() == "50000 100000"
    assert (share.path / "cgroup.procs").read_text() == "17"
    assert sorted(path.name for path in tmp_path.glob("taskvm-*")) == ["taskvm-alive", "taskvm-new"]


def test_where_nothing_may_be_made_the_error_names_each_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cpushare, "places", lambda memberships, mount: [Place(tmp_path / "none", unified=True)]
    )

    with pytest.raises(HostError, match=r"cpu_share=0\.5.*none.*No such file.*Delegate=yes"):
        CpuShare.take("new", 0.5, [], runs=lambda name: True)
