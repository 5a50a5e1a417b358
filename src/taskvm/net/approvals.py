"""Asking a person about hosts that no rule names, while the guest's connection waits.

Rule 1: one question for a host and port at a time, whoever asks, until the approver has returned: connections that
        come and go, and deadlines, add none. Its answer is everybody's who waits.
Rule 2: the deadline's end, a failure and a strange answer mean no. A person's no is remembered; a yes that comes
        when its time is over, and nobody waits, is none.
Rule 3: a guest can cause MAX_QUESTIONS in its life: the next host is refused without asking.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

from taskvm.background import Background
from taskvm.egress.oversight import Answer, Approver, Question
from taskvm.egress.policy import Decision
from taskvm.net.consulting import Consulting

MAX_QUESTIONS = 256

_HINT = "Ask the owner of this sandbox"
_REFUSED = Decision(False, "approver", "a person refused this host", _HINT)
_UNANSWERED = Decision(False, "approver", "nobody allowed this host in time", _HINT)
_TOO_MANY = Decision(False, "approver", "this sandbox has asked about too many hosts", _HINT)
ONCE = Decision(True, "approved once", "a person allowed it for this connection")

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pending:
    """A question that is being asked, and how many connections wait for its answer."""

    decision: asyncio.Future[Decision]
    waiting: int = 0


class Approvals:
    """The questions of one sandbox. `widen` takes a host that is allowed for the sandbox's life."""

    def __init__(self, approver: Approver, deadline_s: float, widen: Callable[[str], None]) -> None:
        self._approver = approver
        self._deadline_s = deadline_s
        self._widen = widen
        self._consulting = Consulting()
        self._asking = Background(lambda error: _logger.error("a question failed", exc_info=error))
        self._pending: dict[tuple[str, int], _Pending] = {}
        self._refused: set[tuple[str, int]] = set()
        self._asked = 0

    async def decide(self, question: Question) -> Decision:
        """Ask, unless it was answered before."""
        key = question.host, question.port
        if key in self._refused:
            return _REFUSED
        pending = self._pending.get(key)
        if pending is None:
            if self._asked >= MAX_QUESTIONS:
                return _TOO_MANY
            self._asked += 1
            pending = self._pending[key] = _Pending(asyncio.get_running_loop().create_future())
            self._asking.start(self._ask(question, pending), f"question about {question.host}")
        pending.waiting += 1
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.shield(pending.decision)
        except TimeoutError:
            return _UNANSWERED
        finally:
            pending.waiting -= 1

    async def aclose(self) -> None:
        """Ask no more. A function that still blocks its thread is not waited for."""
        await self._asking.aclose()
        self._consulting.close()

    async def _ask(self, question: Question, pending: _Pending) -> None:
        decision = _UNANSWERED
        now = asyncio.get_running_loop().time
        deadline = now() + self._deadline_s
        try:
            answer = await self._consult(question)
            decision = self._decide(
                question, answer, late=now() >= deadline and not pending.waiting
            )
        except TimeoutError:
            pass
        except Exception:
            _logger.exception("the approver failed")
        finally:
            del self._pending[question.host, question.port]
            pending.decision.set_result(decision)

    async def _consult(self, question: Question) -> Answer:
        """Return the approver's answer. Raises TimeoutError at the deadline, or what the approver raises."""
        if inspect.iscoroutinefunction(self._approver):
            async with asyncio.timeout(self._deadline_s):
                return await self._consulting.call(self._approver, question)
        calling = self._consulting.submit(self._approver, question)
        called = asyncio.wrap_future(calling)
        try:
            await asyncio.wait([called], timeout=self._deadline_s)
            if calling.cancel():  # all threads were busy: nobody was asked
                raise TimeoutError
            # What has begun cannot be ended: while it asks, nothing else does about this host.
            answer = await called
        finally:
            called.cancel()  # its end may come after the loop's
        if inspect.isawaitable(answer):
            async with asyncio.timeout(self._deadline_s):
                return await answer
        return answer

    def _decide(self, question: Question, answer: Answer, *, late: bool) -> Decision:
        if answer in ("once", "sandbox") and late:
            return _UNANSWERED
        if answer == "sandbox":
            host = f"[{question.host}]" if ":" in question.host else question.host
            self._widen(f"{host}:{question.port}")
            return Decision(True, f"{host}:{question.port}", "a person allowed the host")
        if answer == "once":
            return ONCE
        self._refused.add((question.host, question.port))
        return _REFUSED
