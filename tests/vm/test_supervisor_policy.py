"""Policy and secrets of a held sandbox, changed from the command line: taskvm.cli.policy, taskvm.cli.secret."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.servers import http_server, tls_context
from tests.support.screen import SMALL, TASKVM
from tests.support.waiting import PATIENCE_S

from taskvm import Policy, Secret, UsageError
from taskvm.sync import Supervisor

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("runtime")]
CANARY = "canary-value-5d20a1"


def taskvm(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": PATIENCE_S}
    return subprocess.run([TASKVM, *arguments], env={**os.environ, **variables}, **options)


def test_a_held_sandbox_is_widened_given_a_secret_and_narrowed(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    file = tmp_path / "policy.toml"
    with http_server(tls_context("api.test", ca)) as seen:
        host = f"api.test:{seen.port}"
        options = ["--resolve", "api.test=127.0.0.1", "--allow-address", f"127.0.0.1:{seen.port}"]
        started = taskvm("start", *SMALL, "--name", "held", *options, "--ca-file", str(ca))
        assert started.returncode == 0, started.stderr
        try:
            get = [
                "exec",
                "held",
                "--",
                "sh",
                "-c",
                f'curl -sS -m 90 -H "Authorization: $K" https://{host}/',
            ]
            before = taskvm(*get)
            refused = taskvm("secret", "put", "held", f"K@{host}", K=CANARY)
            changed = taskvm("policy", "change", "held", "--allow", host)
            put = taskvm("secret", "put", "held", f"K@{host}", K=CANARY)
            during = taskvm(*get)
            taskvm("secret", "put", "held", f"K@{host},in=query", K=CANARY)
            queried = taskvm(*get[:-1], f'curl -sS -m 90 "https://{host}/?key=$K"')
            file.write_text(Policy.parse([host]).denying(host).to_toml())
            taskvm("policy", "change", "held", "--policy", str(file))
            shown = taskvm("policy", "show", "held")
            after = taskvm(*get)
            logged = taskvm("log", "--denied", "held")
            wrong = taskvm("policy", "change", "held", "--allow", "*")
            revoked = taskvm("secret", "revoke", "held", "K")
            again = taskvm("secret", "revoke", "held", "NOSUCH")
        finally:
            taskvm("stop", "held")

    assert "Could not resolve" in before.stderr
    assert "a rule denies it" in after.stdout
    assert "not within the allowed hosts" in refused.stderr
    assert f'allow = ["{host}"]' in changed.stdout
    assert put.stdout.startswith("taskvm_secret_K_")
    assert during.stdout == '{"user": "me"}\n', during.stderr
    assert (
        seen.requests[0][2].get("authorization", seen.requests[0][2].get("Authorization")) == CANARY
    )
    assert queried.stdout == '{"user": "me"}\n', queried.stderr
    assert seen.requests[1][1] == f"/?key={CANARY}"
    assert "a rule denies it" in logged.stdout, logged.stderr
    assert Policy.from_text(shown.stdout).rules[0].name == f"deny {host}"
    assert (wrong.returncode, again.returncode, revoked.returncode) == (2, 2, 0)
    everything = [
        before,
        refused,
        changed,
        put,
        during,
        queried,
        shown,
        after,
        wrong,
        revoked,
        again,
    ]
    assert CANARY not in "".join(each.stdout + each.stderr for each in everything)


def test_programs_change_it_too() -> None:
    supervisor = Supervisor()
    held = supervisor.start({"memory": 256, "cpus": 1, "allow": ["a.test"]})
    try:
        assert supervisor.policy(held.id) == Policy.parse(["a.test"])
        narrowed = supervisor.change_policy(held.id, allow=["b.test"], deny=["a.test"])
        assert [rule.name for rule in narrowed.rules] == ["deny a.test", "a.test", "b.test"]
        placeholder = supervisor.put_secret(
            held.id, Secret("T", CANARY, hosts=["b.test"], shape="tok_" + 20 * "*")
        )
        assert placeholder.startswith("tok_")
        supervisor.revoke_secret(held.id, "T")
        with pytest.raises(UsageError, match="no secret"):
            supervisor.revoke_secret(held.id, "NOSUCH")
    finally:
        supervisor.stop(held.id)
