"""Asking a person about hosts that no rule names, while the guest's connection waits.

Rule 1: one question for a host and port at a time, whoever asks; its answer is everybody's who waits.
Rule 2: the deadline's end, a failure and a strange answer mean no. A person's no is remembered.
Rule 3: a guest can cause MAX_QUESTIONS in its life: the next host is refused without asking.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from taskvm.egress.oversight import Answer, Approver, Question
from taskvm.egress.policy import Decision
from taskvm.net.consulting import consult

MAX_QUESTIONS = 256

_HINT = "Ask the owner of this sandbox"
_REFUSED = Decision(False, "approver", "a person refused this host", _HINT)
_UNANSWERED = Decision(False, "approver", "nobody allowed this host in time", _HINT)
_TOO_MANY = Decision(False, "approver", "this sandbox has asked about too many hosts", _HINT)
ONCE = Decision(True, "approved once", "a person allowed it for this connection")

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pending:
    """A question that is being asked."""

    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    decision: Decision | None = None


class Approvals:
    """The questions of one sandbox. `widen` takes a host that is allowed for the sandbox's life."""

    def __init__(self, approver: Approver, deadline_s: float, widen: Callable[[str], None]) -> None:
        self._approver = approver
        self._deadline_s = deadline_s
        self._widen = widen
        self._pending: dict[tuple[str, int], _Pending] = {}
        self._refused: set[tuple[str, int]] = set()
        self._asked = 0

    async def decide(self, question: Question) -> Decision:
        """Ask, unless it was answered before."""
        key = question.host, question.port
        if key in self._refused:
            return _REFUSED
        pending = self._pending.setdefault(key, _Pending())
        try:
            async with asyncio.timeout(self._deadline_s), pending.asking:
                # Somebody else may have asked while we waited; if that one went away, we ask.
                if pending.decision is None:
                    pending.decision = await self._ask(question)
        except TimeoutError:
            pending.decision = pending.decision or _UNANSWERED
        self._forget(key, pending)
        return pending.decision

    async def _ask(self, question: Question) -> Decision:
        if self._asked >= MAX_QUESTIONS:
            return _TOO_MANY
        self._asked += 1
        try:
            answer: Answer = await consult(self._approver, question)
        except Exception:
            _logger.exception("the approver failed")
            return _UNANSWERED
        if answer == "sandbox":
            host = f"[{question.host}]" if ":" in question.host else question.host
            self._widen(f"{host}:{question.port}")
            return Decision(True, f"{host}:{question.port}", "a person allowed the host")
        if answer == "once":
            return ONCE
        self._refused.add((question.host, question.port))
        return _REFUSED

    def _forget(self, key: tuple[str, int], pending: _Pending) -> None:
        if self._pending.get(key) is pending:
            del self._pending[key]
