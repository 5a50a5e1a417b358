"""What judging and looking for secrets cost: decisions a second, and MB/s of a body; CPU time, printed as JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from taskvm.egress.boundsecret import bind_secrets
from taskvm.egress.injection import Injector
from taskvm.egress.policy import Intent, Policy, decide_request
from taskvm.egress.redaction import Redactor
from taskvm.egress.secret import Secret

RULES = 50
SECRETS = 4
CHUNK = 64 * 1024
ROUNDS = 5


def best(work: Callable[[], object]) -> float:
    """Return the least CPU seconds of ROUNDS runs."""
    times = []
    for _ in range(ROUNDS):
        before = time.process_time()
        work()
        times.append(time.process_time() - before)
    return min(times)


def main() -> None:
    hosts = [f"h{number}.example.com" for number in range(RULES)]
    rules = "".join(
        f'[[rules]]\naction = "allow"\nhosts = ["{host}"]\nmethods = ["GET"]\npaths = ["/v1/**"]\n'
        for host in hosts
    )
    policy = Policy.from_text(rules)
    last = Intent("https", hosts[-1], 443, "GET", b"/v1/models/some/more?page=2")
    secrets = [
        Secret(f"K{n}", os.urandom(20).hex(), hosts=[hosts[n]], places=["body"])
        for n in range(SECRETS)
    ]
    bound = bind_secrets(policy, secrets, os.urandom)
    headers = [(b"Authorization", bound[0].placeholder.encode()), *[(b"X-Header", b"value")] * 10]
    injector = Injector(bound)
    text = (b'{"key": "value", "number": 12345}\n' * 4000)[:CHUNK]

    def stream(make: Callable[[], object]) -> float:
        body = make()
        return 16 * CHUNK / 1e6 / best(lambda: [body.feed(text) for _ in range(16)])  # type: ignore[attr-defined]

    figures = {
        "decisions_per_s": 1000 / best(lambda: [decide_request(policy, last) for _ in range(1000)]),
        "heads_injected_per_s": 1000
        / best(
            lambda: [injector.inject("https", hosts[0], 443, b"/v1", headers) for _ in range(1000)]
        ),
        "request_body_mb_per_s": stream(
            lambda: injector.body("https", hosts[0], 443, b"application/json", print)[0]
        ),
        "response_body_mb_per_s": stream(lambda: Redactor(bound, {}, print).body()),
    }
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}))


main()
