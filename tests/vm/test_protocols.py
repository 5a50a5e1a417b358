"""Clients that people use, in a real guest, against real servers, with nothing told to them about the gateway."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.support.egress_lab import SERVER_CA
from tests.support.h2_lab import echo, h2_server
from tests.support.web import file_server, grpc_echo, server_context, websocket_server

from taskvm import Sandbox

pytestmark = pytest.mark.vm

HOST = "api.test"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    SERVER_CA.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that a server serves."""
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def https(site: Path) -> Iterator[int]:
    with file_server(site, server_context(HOST)) as port:
        yield port


@asynccontextmanager
async def guest(ca: Path, image: str | None = None, **options: object) -> AsyncIterator[Sandbox]:
    reach = {"allow": [HOST], "resolve": {HOST: "127.0.0.1"}, "allow_addresses": ["127.0.0.1"]}
    async with Sandbox.create(
        **{**GUEST, **reach, "extra_ca_files": [ca], "image": image, **options}
    ) as vm:
        yield vm


def audit_of(vm: Sandbox) -> list[dict[str, object]]:
    return [json.loads(line) for line in vm.audit_path.read_text().splitlines()]


async def run(vm: Sandbox, command: str | list[str], **options: object) -> str:
    """Run a command that must succeed; return what it wrote."""
    result = await vm.exec(command, timeout_s=200, **options)
    assert result.exit_code == 0, result.stdout + result.stderr
    return result.stdout


async def test_curl_speaks_every_version(ca: Path) -> None:
    async with h2_server(echo, alpn=["h2"]) as server, guest(ca) as vm:
        url = f"https://{HOST}:{server.port}/path"
        version = await run(vm, f"curl -sS -o /dev/null -w '%{{http_version}}' {url}")
        posted = await run(vm, f"curl -sS --data-binary hello {url}")
        many = await run(vm, f"curl -sS -Z --parallel-max 20 '{url}?[1-20]'")

    assert version == "2"
    assert posted == "hello"
    assert many.count("/path?") == 20
    assert server.connections == 3


async def test_git_clones_and_pushes(ca: Path, site: Path, https: int, tmp_path: Path) -> None:
    work = tmp_path / "work"
    make = f"""git init -q -b main {work} && cd {work} && echo one > file && git add . &&
        git -c user.name=a -c user.email=a@b commit -qm one &&
        git clone -q --bare {work} {site}/repo.git && git -C {site}/repo.git config http.receivepack true"""
    subprocess.run(["sh", "-ec", make], check=True)

    async with guest(ca) as vm:
        await run(vm, f"git clone -q https://{HOST}:{https}/repo.git /tmp/repo")
        change = "echo two > file && git -c user.name=a -c user.email=a@b commit -qam two"
        await run(vm, f"cd /tmp/repo && {change} && git push -q origin main")

    log = ["git", "-C", str(site / "repo.git"), "log", "--format=%s", "main"]
    assert subprocess.run(log, capture_output=True, check=True, text=True).stdout == "two\none\n"


async def test_pip_installs_from_an_index(
    ca: Path, site: Path, https: int, programs_image: str
) -> None:
    wheel = site / "simple" / "tiny" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "answer = 42\n")
        info = "tiny-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')

    async with guest(ca, programs_image) as vm:
        index = f"https://{HOST}:{https}/simple/"
        await run(
            vm, f"pip install -q --break-system-packages --index-url {index} --target /tmp/p tiny"
        )
        answer = await run(vm, "PYTHONPATH=/tmp/p python3 -c 'import tiny; print(tiny.answer)'")

    assert answer == "42\n"


async def test_npm_installs_from_a_registry(
    ca: Path, site: Path, https: int, programs_image: str
) -> None:
    base = f"https://{HOST}:{https}"
    package = {"name": "tiny", "version": "1.0.0", "main": "index.js"}
    with tarfile.open(site / "tiny-1.0.0.tgz", "w:gz") as archive:
        for name, text in (
            ("package.json", json.dumps(package)),
            ("index.js", "module.exports = 42"),
        ):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    version = {**package, "dist": {"tarball": f"{base}/tiny-1.0.0.tgz"}}
    listing = {"name": "tiny", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
    (site / "tiny").write_text(json.dumps(listing))

    async with guest(ca, programs_image, memory_mib=512) as vm:
        await vm.exec(["mkdir", "/tmp/n"], check=True)
        install = f"npm install --no-audit --no-fund --no-update-notifier --registry {base}/ tiny"
        await run(vm, install, cwd="/tmp/n")
        answer = await run(vm, "node -p 'require(\"tiny\")'", cwd="/tmp/n")

    assert answer == "42\n"


async def test_node_fetches(ca: Path, site: Path, https: int, programs_image: str) -> None:
    (site / "hello").write_text("for node")
    # Node gives up a connection after 10 s, and has no option for that.
    code = f"""
const get = () => fetch("https://{HOST}:{https}/hello").catch(error => {{
  if (error.cause?.code !== "UND_ERR_CONNECT_TIMEOUT") throw error;
  return get();
}});
get().then(async r => console.log(r.status, await r.text()));
"""

    async with guest(ca, programs_image) as vm:
        printed = await run(vm, ["node", "-e", code])

    assert printed == "200 for node\n"


async def test_python_clients(ca: Path, programs_image: str) -> None:
    """requests over HTTP/1.1 and httpx over HTTP/2, each with a large body up and down."""
    code = """
import httpx, requests, sys
url, body = sys.argv[1], b"x" * 300_000
with httpx.Client(http2=True, timeout=200) as client:
    answers = [client.post(url, content=body) for _ in range(2)]
    print([(a.http_version, a.status_code, len(a.content)) for a in answers])
a = requests.post(sys.argv[2] + "/y", data=body)
print(a.status_code, a.json()["error"]["type"])
"""
    async with h2_server(_swallow) as server, guest(ca, programs_image) as vm:
        url = f"https://{HOST}:{server.port}"
        printed = await run(vm, ["python3", "-c", code, url, f"http://{HOST}:1"])

    assert printed == "[('HTTP/2', 200, 6), ('HTTP/2', 200, 6)]\n502 upstream_failed\n"
    assert [len(seen.body) for seen in server.requests] == [300_000, 300_000]


def _swallow(call, ended: bool) -> None:
    if ended:
        call.head(200)
        call.data(b"%d" % len(call.seen.body), end=True)


async def test_a_grpc_call(ca: Path, programs_image: str) -> None:
    code = """
import grpc, sys
channel = grpc.secure_channel(sys.argv[1], grpc.ssl_channel_credentials())
say, fail = (channel.unary_unary("/lab.Echo/" + name) for name in ("Say", "Fail"))
patient = {"timeout": 200, "wait_for_ready": True}  # else the call ends with the first attempt to connect
print(say(b"hello", **patient).decode())
try:
    fail(b"hello", **patient)
except grpc.RpcError as error:
    print(error.code().name, error.details())
"""
    async with h2_server(grpc_echo) as server, guest(ca, programs_image) as vm:
        printed = await run(vm, ["python3", "-c", code, f"{HOST}:{server.port}"])
        audit = audit_of(vm)

    assert printed == "HELLO\nNOT_FOUND no\n"
    assert {"/lab.Echo/Say", "/lab.Echo/Fail"} <= {line.get("path") for line in audit}


async def test_a_websocket(ca: Path, programs_image: str) -> None:
    code = """
import asyncio, sys, websockets
async def main():
    async with websockets.connect(sys.argv[1], open_timeout=200, ping_interval=None) as socket:
        for word in ("one", "two"):
            await socket.send(word)
            print(await socket.recv())
asyncio.run(main())
"""
    async with websocket_server(server_context(HOST)) as port, guest(ca, programs_image) as vm:
        printed = await run(vm, ["python3", "-c", code, f"wss://{HOST}:{port}/chat"])
        audit = audit_of(vm)

    assert printed == "ONE\nTWO\n"
    assert [line["status"] for line in audit if line["kind"] == "response"] == [101]


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_apt_installs_from_an_archive(
    ca: Path, site: Path, tmp_path: Path, scheme: str
) -> None:
    """Debian's archive of one package, unsigned and marked as trusted."""
    control = tmp_path / "tiny" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: d\n"
    )
    binary = tmp_path / "tiny" / "usr" / "bin" / "tiny"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\necho installed\n")
    binary.chmod(0o755)
    build = ["dpkg-deb", "--root-owner-group", "-b", str(tmp_path / "tiny"), str(site / "tiny.deb")]
    subprocess.run(build, check=True, capture_output=True)
    data = (site / "tiny.deb").read_bytes()
    listed = f"Filename: tiny.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
    (site / "Packages").write_text(control.read_text() + listed)

    context = server_context(HOST) if scheme == "https" else None
    with file_server(site, context) as port:
        async with guest(ca) as vm:
            source = f"deb [trusted=yes] {scheme}://{HOST}:{port}/ ./\n"
            only = "-o Dir::Etc::sourcelist=/tmp/list -o Dir::Etc::sourceparts=-"
            await vm.files.write_text("/tmp/list", source)
            await run(
                vm, f"apt-get -q {only} update && apt-get -qy {only} install tiny", user="root"
            )
            printed = await run(vm, "tiny")

    assert printed == "installed\n"


async def test_a_client_in_go(ca: Path, site: Path, https: int, programs_image: str) -> None:
    """git-lfs asks its server for locks: Go's own TLS and HTTP/2 against the gateway."""
    async with guest(ca, programs_image) as vm:
        setup = (
            f"git init -q /tmp/r && cd /tmp/r && git remote add origin https://{HOST}:{https}/x.git"
        )
        asked = await vm.exec(f"{setup} && git lfs locks", timeout_s=200)
        audit = audit_of(vm)

    requests = [line for line in audit if line["kind"] == "request"]
    assert requests, asked.stdout + asked.stderr
    assert "x509" not in asked.stderr


async def test_a_pinned_host_is_verified_by_the_guest_itself(
    ca: Path, site: Path, https: int
) -> None:
    """With passthrough the guest sees the server's own certificate, which the host's CA file vouches for."""
    (site / "quiet").write_text("unread")
    async with guest(ca, passthrough=[HOST]) as vm:
        seen = await run(vm, f"curl -sSv https://{HOST}:{https}/quiet 2>&1")
        audit = audit_of(vm)

    assert "issuer: O=trustme" in seen
    assert seen.endswith("unread") or "unread" in seen
    assert next(line["rule"] for line in audit if line["kind"] == "tls") == "passthrough"
    assert "/quiet" not in json.dumps(audit)
