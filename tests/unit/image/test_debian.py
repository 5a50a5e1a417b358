"""taskvm.image.debian: what mmdebstrap is asked for, and what its output is turned into."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from taskvm.errors import ImageError
from taskvm.image.debian import (
    AptMeter,
    _run_mmdebstrap,
    host_apt_options,
    mmdebstrap_options,
    mount_namespace,
)
from taskvm.image.manifest import ImageSpec


def test_the_hosts_proxy_is_used_and_its_index_settings_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tmp_path / "apt.conf"
    configuration.write_text(
        'Acquire::http::Proxy "http://proxy.example:3128";\n'
        'Acquire::Retries "7";\n'
        'Acquire::Languages "de";\n'
        'Acquire::IndexTargets::deb::Extra::MetaKey "x";\n'
        'APT::Get::AllowUnauthenticated "true";\n'
        'Acquire::AllowInsecureRepositories "true";\n'
        'acquire::allowdowngradetoinsecurerepositories "true";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(configuration))

    options = host_apt_options()

    assert 'Acquire::http::Proxy "http://proxy.example:3128"' in options
    assert 'Acquire::Retries "7"' in options
    assert not [option for option in options if "Languages" in option or "IndexTargets" in option]
    assert not [option for option in options if "allow" in option.lower()]


def test_the_wanted_packages_join_the_base() -> None:
    spec = ImageSpec(include=("make", "git"))

    options = mmdebstrap_options(spec, "root", Path("/somewhere"), [])

    includes = [option for option in options if option.startswith("--include=")]
    assert includes == [
        "--include=bash,ca-certificates,coreutils,curl,file,git,less,make,mount,procps,python3,ripgrep"
    ]


def test_the_kernel_is_fetched_before_the_mirrors_configuration_is_removed() -> None:
    options = mmdebstrap_options(ImageSpec(), "root", Path("/a b"), [])

    hooks = [option for option in options if option.startswith("--customize-hook=")]
    assert "apt-get download" in hooks[0]
    assert hooks[1] == "--customize-hook=download /taskvm-kernel.deb '/a b/kernel.deb'"
    assert "99mmdebstrap" in hooks[2]


def test_progress_counts_packages_of_each_batch_and_keeps_quiet_about_the_rest() -> None:
    said: list[str] = []
    meter = AptMeter(said.append)

    meter.feed("I: running apt-get update...\n")
    meter.feed("Get:1 http://mirror.example/debian bookworm InRelease [151 kB]\n")
    meter.feed("0 upgraded, 40 newly installed, 0 to remove and 0 not upgraded.\n")
    meter.feed("Need to get 38.0 MB of archives.\n")
    for number in range(40):
        meter.feed(f"Get:{number} http://mirror.example/debian bookworm/main amd64 p{number} 1\n")
    for number in range(19):
        meter.feed(f"Setting up p{number} (1) ...\n")

    assert said == [
        "running apt-get update",
        "fetching 40 packages, 38.0 MB",
        "20 of 40 packages fetched",
        "40 of 40 packages fetched",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's mounts would be the host's")
def test_what_a_build_mounts_as_root_is_not_seen_by_the_host(tmp_path: Path) -> None:
    script = f"mount -t tmpfs none {tmp_path} && grep -q ' {tmp_path} ' /proc/self/mountinfo && kill -9 $$"

    killed = subprocess.run([*mount_namespace("root"), "sh", "-c", script], check=False)

    assert killed.returncode == -signal.SIGKILL
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_an_ordinary_users_build_has_a_namespace_from_mmdebstrap() -> None:
    assert mount_namespace("unshare") == []


@pytest.mark.parametrize(
    ("complaint", "step"),
    [
        ("E: Unable to locate package nosuch", "Look at the names of the packages"),
        ("E: Failed to fetch the index", "Check the mirror and the network"),
    ],
)
def test_a_failed_build_says_what_to_look_at(tmp_path: Path, complaint: str, step: str) -> None:
    argv = ["sh", "-c", f"cat >/dev/null; echo '{complaint}' >&2; exit 25", "sh"]

    with pytest.raises(ImageError, match=complaint) as caught:
        _run_mmdebstrap(argv, {"PATH": os.environ["PATH"]}, b"", tmp_path, lambda line: None)

    assert caught.value.next_step.startswith(step)
