"""Asking a person, and hooks: what they can say, and what a guest cannot make of them.

Judged from what reached the server, what the person was asked, and from the record.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from tests.support.egress_lab import HttpServer, Lab, egress_lab, http_server, scripted_server
from tests.support.waiting import PATIENCE_S, until, until_settled

from taskvm.egress.oversight import (
    Answer,
    Approver,
    HttpAnswer,
    HttpHook,
    HttpRequest,
    HttpResponse,
    Oversight,
    Question,
    Refuse,
)
from taskvm.egress.policy import Decision
from taskvm.egress.secret import Secret
from taskvm.net import approvals

VALUE = "sk-live-0123456789"


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with http_server() as server:
        yield server


class Person:
    """Answers questions, and remembers them."""

    def __init__(self, *answers: Answer, delay_s: float = 0.0) -> None:
        self.asked: list[Question] = []
        self.ready = asyncio.Event()
        self.ready.set()
        self._answers = list(answers)
        self._delay_s = delay_s

    async def answer(self, question: Question) -> Answer:
        self.asked.append(question)
        await asyncio.sleep(self._delay_s)
        await self.ready.wait()
        return self._answers.pop(0)


@asynccontextmanager
async def lab_for(
    port: int, approver: Approver | None = None, *, hook: HttpHook | None = None, rules: str = "",
    deadline_s: float = PATIENCE_S, allow: tuple[str, ...] = (), secrets: tuple[Secret, ...] = (),
) -> AsyncIterator[Lab]:  # fmt: skip
    names = ("api.test", "new.test", "other.test")
    oversight = Oversight(approver, deadline_s, hooks=(hook,) if hook else ())
    async with egress_lab(
        allow=allow, rules=rules, oversight=oversight, secrets=secrets,
        allow_addresses=[f"127.0.0.1:{port}"], hosts={name: ["127.0.0.1"] for name in names},
    ) as lab:  # fmt: skip
        yield lab


def request(host: str, port: int, line: str = "GET /a?b=c HTTP/1.1", *headers: str) -> bytes:
    return "\r\n".join([line, f"Host: {host}:{port}", *headers, "", ""]).encode()


async def ask(lab: Lab, host: str, port: int, *, line: str = "GET /a?b=c HTTP/1.1") -> int:
    sock = await lab.connect(host, port)
    await sock.write(request(host, port, line))
    return int((await sock.read_response()).split()[1])


# Asking.


async def test_a_person_allows_a_host_once_or_for_the_sandbox(server: HttpServer) -> None:
    person = Person("once", "sandbox")
    async with lab_for(server.port, person.answer) as lab:
        sock = await lab.connect("new.test", server.port)
        for _ in range(2):  # once: this connection
            await sock.write(request("new.test", server.port))
            assert b" 200 " in await sock.read_response()
        again = [await ask(lab, "new.test", server.port) for _ in range(2)]

        assert again == [200, 200]
        assert [str(rule.hosts[0]) for rule in lab.gateway.policy.rules] == [
            f"new.test:{server.port}"
        ]
    assert person.asked == [Question("box", "new.test", server.port, "http", "GET", "/a")] * 2
    assert [e.decision for e in lab.events if e.kind == "ask"] == ["allow", "allow"]


async def test_a_no_is_remembered_and_the_server_sees_nothing(server: HttpServer) -> None:
    person = Person("deny")
    async with lab_for(server.port, person.answer) as lab:
        answers = [await ask(lab, "new.test", server.port) for _ in range(3)]

        assert answers == [403] * 3
        assert {event.rule for event in lab.denials("request")} == {"approver"}
        assert lab.resolver.asked == []
    assert (len(person.asked), server.connections) == (1, 0)


async def test_identical_questions_are_asked_once(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer comes when all five wait for it."""
    person = Person("once")
    person.ready.clear()
    waiting: list[Question] = []
    decide = approvals.Approvals.decide

    async def counted(self: approvals.Approvals, question: Question) -> Decision:
        waiting.append(question)
        if len(waiting) == 5:
            person.ready.set()
        return await decide(self, question)

    monkeypatch.setattr(approvals.Approvals, "decide", counted)
    async with lab_for(server.port, person.answer) as lab:
        answers = await asyncio.gather(*(ask(lab, "new.test", server.port) for _ in range(5)))

    assert answers == [200] * 5
    assert len(person.asked) == 1


async def _never(question: Question) -> Answer:
    await asyncio.Event().wait()
    return "once"


async def _fails(question: Question) -> Answer:
    raise StopIteration


def _fails_plainly(question: Question) -> Answer:
    raise StopIteration


def _says_nonsense(question: Question) -> Answer:
    return "yes"  # type: ignore[return-value]  # what a careless program says


@pytest.mark.parametrize("approver", [_never, _fails, _fails_plainly, _says_nonsense])
async def test_no_answer_means_no(server: HttpServer, approver: Approver) -> None:
    async with lab_for(server.port, approver, deadline_s=0.3) as lab:
        assert await ask(lab, "new.test", server.port) == 403
    assert server.connections == 0


async def test_nobody_is_asked_about_what_a_rule_denies_or_an_internal_address(
    server: HttpServer,
) -> None:
    rules = (
        '[[rules]]\naction = "deny"\nhosts = ["other.test"]\n'
        '[[rules]]\naction = "allow"\nhosts = ["api.test"]\nmethods = ["GET"]\n'
    )
    person = Person()
    async with lab_for(server.port, person.answer, rules=rules) as lab:
        denied = await lab.guest.resolve("other.test")
        method = await ask(lab, "api.test", server.port, line="POST /a HTTP/1.1")
        internal = []
        for address in ("169.254.169.254", "10.0.0.1", "198.18.0.200"):
            sock = await lab.guest.connect(address, 80)
            internal.append((await sock.exchange(request(address, 80))).split()[1])

    assert (denied, method, internal) == ((3, None), 403, [b"403"] * 3)
    assert person.asked == []


async def test_an_approved_name_does_not_lead_inside(server: HttpServer) -> None:
    person = Person("sandbox")
    async with egress_lab(
        oversight=Oversight(person.answer), hosts={"new.test": ["127.0.0.1"]}
    ) as lab:
        assert await ask(lab, "new.test", server.port) == 403
        assert lab.denials("connect")[0].rule == "special-address"
    assert server.connections == 0


async def test_a_guest_can_ask_so_often_and_not_more(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approvals, "MAX_QUESTIONS", 2)
    person = Person("deny", "deny", "sandbox")
    async with lab_for(server.port, person.answer) as lab:
        answers = [await ask(lab, f"n{number}.test", server.port) for number in range(4)]

    assert answers == [403] * 4
    assert len(person.asked) == 2


class Dialog:
    """A plain function that blocks its thread until somebody answers."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[Question] = []
        self.answered = threading.Event()
        self._answer = answer

    def ask(self, question: Question) -> Answer:
        self.asked.append(question)
        assert self.answered.wait(PATIENCE_S)
        return self._answer


async def _come_and_go(lab: Lab, port: int) -> None:
    """Ask for a host, and be gone before the answer."""
    sock = await lab.connect("new.test", port)
    await sock.write(request("new.test", port))
    await until_settled(lambda: lab.gateway.connections, for_s=0.1)
    sock.reset()
    await until(lambda: not lab.gateway.connections)


@pytest.mark.parametrize("plain", [False, True])
async def test_a_guest_that_comes_and_goes_asks_one_question(
    server: HttpServer, plain: bool
) -> None:
    dialog, person = Dialog("once"), Person("once")
    person.ready.clear()
    approver = dialog.ask if plain else person.answer
    async with lab_for(server.port, approver, deadline_s=PATIENCE_S) as lab:
        asking = lab.gateway._egress.approvals
        assert asking is not None
        for _ in range(5):
            await _come_and_go(lab, server.port)
        assert not sum(pending.waiting for pending in asking._pending.values())
        async with asyncio.TaskGroup() as group:
            last = group.create_task(ask(lab, "new.test", server.port))
            await until(lambda: sum(pending.waiting for pending in asking._pending.values()))
            person.ready.set()
            dialog.answered.set()

        assert last.result() == 200
        assert len(dialog.asked + person.asked) == 1


async def test_a_question_whose_time_is_over_stands_alone_and_its_late_yes_is_none(
    server: HttpServer,
) -> None:
    """No thread can be ended: while it asks, nothing else does, and a yes that nobody waits for opens nothing."""
    dialog = Dialog("sandbox")
    async with lab_for(server.port, dialog.ask, deadline_s=0.2) as lab:
        while not dialog.asked:  # a thread that comes late asks nobody
            assert await ask(lab, "new.test", server.port) == 403
        answers = [await ask(lab, "new.test", server.port) for _ in range(2)]
        asked = len(dialog.asked)
        dialog.answered.set()
        assert lab.gateway._egress.approvals is not None
        await until(lambda: not lab.gateway._egress.approvals._pending)

        assert (answers, asked) == ([403, 403], 1)
        assert lab.gateway.policy.is_silent_about("new.test")


async def test_people_who_do_not_answer_hold_up_no_other_sandbox(server: HttpServer) -> None:
    dialog = Dialog("deny")
    hook = HttpHook(lambda request: None)
    async with lab_for(server.port, dialog.ask, deadline_s=0.2) as lab:
        answers = [ask(lab, f"n{number}.test", server.port) for number in range(40)]
        assert set(await asyncio.gather(*answers)) == {403}

        async with lab_for(server.port, hook=hook, allow=("api.test",)) as other:
            assert await ask(other, "api.test", server.port) == 200
            assert await asyncio.to_thread(lambda: 1) == 1
        dialog.answered.set()


# Hooks.


async def test_a_hook_sees_and_changes_a_request_and_its_response(server: HttpServer) -> None:
    seen: list[HttpRequest] = []

    async def on_request(request: HttpRequest) -> HttpRequest:
        seen.append(request)
        return replace(request, target="/changed", headers=(*request.headers, ("X-Added", "1")))

    def on_response(request: HttpRequest, response: HttpResponse) -> HttpResponse:
        assert request.target == "/changed"
        return replace(response, status=299, headers=(*response.headers, ("X-Seen", "2")))

    async with lab_for(
        server.port, hook=HttpHook(on_request, on_response), allow=("api.test",)
    ) as lab:
        sock = await lab.connect("api.test", server.port)
        await sock.write(request("api.test", server.port))
        answer = await sock.read_response()

        assert answer.startswith(b"HTTP/1.1 299")
        assert b"x-seen: 2" in answer.lower()
        assert [event.path for event in lab.events if event.kind == "request"] == ["/changed"]
    assert (seen[0].host, seen[0].target) == ("api.test", "/a?b=c")
    assert (server.requests[0].path, server.requests[0].header("X-Added")) == ("/changed", "1")


class Upper:
    """A body's filter."""

    def feed(self, data: bytes) -> bytes:
        return data.upper()

    def finish(self) -> bytes:
        return b"!"


async def test_bodies_stream_through_a_hooks_filters(server: HttpServer) -> None:
    hook = HttpHook(
        lambda request: replace(request, body=Upper()),
        lambda request, response: replace(response, body=Upper()),
    )
    async with lab_for(server.port, hook=hook, allow=("api.test",)) as lab:
        sock = await lab.connect("api.test", server.port)
        line = "POST / HTTP/1.1"
        head = request("api.test", server.port, line, "Connection: close", "Content-Length: 4")
        answer = await sock.exchange(head + b"body")

    assert server.requests[0].body == b"BODY!"
    assert b"BODY!" in answer
    assert b"!" in answer.partition(b"BODY!")[2]


async def test_a_filter_adds_nothing_to_an_answer_that_has_no_body(server: HttpServer) -> None:
    """What a HEAD answers describes a body, and none follows: the connection goes on."""
    hook = HttpHook(on_response=lambda request, response: replace(response, body=Upper()))
    async with lab_for(server.port, hook=hook, allow=("api.test",)) as lab:
        sock = await lab.connect("api.test", server.port)
        await sock.write(request("api.test", server.port, "HEAD / HTTP/1.1"))
        head = await sock.read()
        line = "GET / HTTP/1.1"
        answer = await sock.exchange(request("api.test", server.port, line, "Connection: close"))

    assert head.startswith(b"HTTP/1.1 200")
    assert head.endswith(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("status", [204, 304])
async def test_a_hook_may_answer_with_a_status_that_has_no_body(
    server: HttpServer, status: int
) -> None:
    hook = HttpHook(on_response=lambda request, response: replace(response, status=status))
    async with lab_for(server.port, hook=hook, allow=("api.test",)) as lab:
        sock = await lab.connect("api.test", server.port)
        await sock.write(request("api.test", server.port))
        head = await sock.read()
        last = request("api.test", server.port, "GET / HTTP/1.1", "Connection: close")
        answer = await sock.exchange(last)

    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert head.endswith(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    assert len(server.requests) == 2


async def test_a_filter_may_add_to_an_answer_whose_body_is_empty() -> None:
    hook = HttpHook(on_response=lambda request, response: replace(response, body=Upper()))
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    async with (
        scripted_server(answer) as server,
        lab_for(server.port, hook=hook, allow=("api.test",)) as lab,
    ):
        sock = await lab.connect("api.test", server.port)
        line = "GET / HTTP/1.1"
        shown = await sock.exchange(request("api.test", server.port, line, "Connection: close"))

    assert shown.endswith(b"\r\n\r\n1\r\n!\r\n0\r\n\r\n")


async def test_a_hook_answers_or_refuses_and_the_server_sees_nothing(server: HttpServer) -> None:
    answers: list[HttpAnswer | Refuse] = [
        HttpAnswer(203, (("X-Mine", "1"),), b"mine"), HttpAnswer(204), Refuse("not today", "ask"),
    ]  # fmt: skip

    async def on_request(request: HttpRequest) -> HttpAnswer | Refuse:
        return answers.pop(0)

    async with lab_for(server.port, hook=HttpHook(on_request), allow=("api.test",)) as lab:
        got = []
        for _ in range(3):
            sock = await lab.connect("api.test", server.port)
            got.append(await sock.exchange(request("api.test", server.port)))

    assert got[0].startswith(b"HTTP/1.1 203")
    assert got[0].endswith(b"\r\n\r\nmine")
    assert got[1].startswith(b"HTTP/1.1 204")
    error = json.loads(got[2].partition(b"\r\n\r\n")[2])["error"]
    assert (error["rule"], error["reason"], error["hint"]) == ("hook", "not today", "ask")
    assert server.connections == 0
    assert [(e.decision, e.rule) for e in lab.events if e.kind == "request"] == [
        ("allow", "hook"), ("allow", "hook"), ("deny", "hook"),
    ]  # fmt: skip


def _other_host(request: HttpRequest) -> HttpRequest:
    return replace(request, host="other.test")


def _splits(request: HttpRequest) -> HttpRequest:
    return replace(request, headers=(("X", "a\r\nHost: evil.test"),))


def _bad_target(request: HttpRequest) -> HttpRequest:
    return replace(request, target="/a b")


def _bad_name(request: HttpRequest) -> HttpRequest:
    return replace(request, headers=(("X Y", "1"),))


def _connects(request: HttpRequest) -> HttpRequest:
    return replace(request, method="CONNECT")


def _raises(request: HttpRequest) -> HttpRequest:
    raise StopIteration


@pytest.mark.parametrize(
    "on_request", [_other_host, _splits, _bad_target, _bad_name, _connects, _raises]
)
async def test_a_hooks_answer_that_is_no_request_is_refused(
    server: HttpServer, on_request: Callable[[HttpRequest], HttpRequest]
) -> None:
    async with lab_for(server.port, hook=HttpHook(on_request), allow=("api.test",)) as lab:
        assert await ask(lab, "api.test", server.port) == 502
    assert server.connections == 0


async def test_what_a_hook_changes_is_judged_again(server: HttpServer) -> None:
    rules = '[[rules]]\naction = "allow"\nhosts = ["api.test"]\npaths = ["/a"]\n'
    hook = HttpHook(lambda request: replace(request, target="/admin"))
    async with lab_for(server.port, hook=hook, rules=rules) as lab:
        assert await ask(lab, "api.test", server.port) == 403
        assert lab.denials("request")[0].path == "/admin"
    assert server.connections == 0


async def test_a_hook_is_not_called_for_what_is_denied(server: HttpServer) -> None:
    called: list[HttpRequest] = []
    async with lab_for(server.port, hook=HttpHook(called.append), allow=("api.test:1",)) as lab:
        assert await ask(lab, "api.test", server.port) == 403

    assert called == []


async def test_a_hook_sees_placeholders_only(server: HttpServer) -> None:
    shown: list[str] = []
    hook = HttpHook(
        lambda request: shown.append(repr(request)),
        lambda request, response: shown.append(repr((request, response))),
    )
    secret = Secret("KEY", VALUE, hosts=[f"api.test:{server.port}"], places=["body"])
    async with lab_for(server.port, hook=hook, allow=("api.test",), secrets=(secret,)) as lab:
        placeholder = lab.secrets[0].placeholder
        sock = await lab.connect("api.test", server.port)
        head = [f"Authorization: {placeholder}", f"Content-Length: {len(placeholder)}"]
        await sock.write(
            request("api.test", server.port, "POST / HTTP/1.1", "Connection: close", *head)
            + placeholder.encode()
        )
        answer = await sock.read_all()

    assert server.requests[0].header("Authorization") == VALUE
    assert server.requests[0].body == VALUE.encode()
    assert VALUE not in "".join(shown)
    assert VALUE.encode() not in answer
    assert placeholder in shown[0]


async def test_a_slow_hook_holds_up_nobody_else(server: HttpServer) -> None:
    go_on = threading.Event()

    def on_request(request: HttpRequest) -> None:
        if request.target == "/slow":
            assert go_on.wait(PATIENCE_S)

    async with lab_for(server.port, hook=HttpHook(on_request), allow=("api.test",)) as lab:
        slow = await lab.connect("api.test", server.port)
        await slow.write(request("api.test", server.port, "GET /slow HTTP/1.1"))
        fast = await ask(lab, "api.test", server.port)
        arrived = [seen.path for seen in server.requests]
        go_on.set()

        assert fast == 200
        assert arrived == ["/a?b=c"]
        assert b" 200 " in await slow.read_response()
