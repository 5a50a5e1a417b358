"""Calling a program's hooks: what they see, and what of their answer is taken.

A hook is the owner's code and trusted, but its answer must still be HTTP: what could end a line, or
frame a message, is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import TypeVar

from taskvm.egress.oversight import (
    Fields,
    HttpAnswer,
    HttpHook,
    HttpRequest,
    HttpResponse,
    Refuse,
)
from taskvm.net.consulting import Consulting
from taskvm.net.egress import Refusal
from taskvm.wire.message import (
    BodyFilter,
    Header,
    HttpRefused,
    Origin,
    RequestHead,
    ResponseHead,
    check_header,
    check_method,
    check_size,
    check_target,
    end_to_end,
    without_length,
)

HOOK_TIMEOUT_S = 60.0

Result = TypeVar("Result")
_logger = logging.getLogger(__name__)


class HookAnswer(Refusal):
    """Raised where a hook answers a request itself."""

    def __init__(self, answer: HttpAnswer) -> None:
        super().__init__(answer.status, "hook", "hook", "a hook answered")
        length = b"%d" % len(answer.content)
        self._headers = [*_to_wire(answer.headers), (b"Content-Length", length)]
        self._content = answer.content

    def render(self, host: str) -> tuple[list[Header], bytes]:
        del host
        return self._headers, self._content


class Hooked:
    """The hooks of one sandbox, for the requests of one connection."""

    def __init__(self, hooks: Sequence[HttpHook], origin: Origin, consulting: Consulting) -> None:
        self._hooks = hooks
        self._origin = origin
        self._consulting = consulting

    def __bool__(self) -> bool:
        return bool(self._hooks)

    async def request(self, head: RequestHead) -> tuple[RequestHead, BodyFilter | None]:
        """Return the request as the hooks want it. Raises Refusal, HookAnswer."""
        seen = self._see(head)
        for hook in self._hooks:
            if hook.on_request is not None:
                wanted = await _call(self._consulting.call(hook.on_request, seen))
                if isinstance(wanted, Refuse):
                    raise _refuse(wanted)
                if isinstance(wanted, HttpAnswer):
                    raise _checked_answer(wanted)
                seen = _chain(seen, wanted or seen)
        return self._take(head, seen), seen.body

    async def response(
        self, request: RequestHead, response: ResponseHead
    ) -> tuple[ResponseHead, BodyFilter | None]:
        """Return the response as the hooks want it. Raises Refusal."""
        seen = HttpResponse(response.status, _to_text(response.headers))
        for hook in self._hooks:
            if hook.on_response is not None:
                wanted = await _call(
                    self._consulting.call(hook.on_response, self._see(request), seen)
                )
                if isinstance(wanted, Refuse):
                    raise _refuse(wanted)
                seen = _chain(seen, wanted or seen)
        if not 200 <= seen.status <= 599:
            raise _broken("its status is none of a final response")
        headers = _framed(_to_wire(seen.headers), response.headers, seen.body)
        return replace(response, status=seen.status, headers=headers), seen.body

    def _see(self, head: RequestHead) -> HttpRequest:
        origin = self._origin
        return HttpRequest(
            origin.scheme, origin.host, origin.port, head.method.decode("latin-1"),
            head.target.decode("latin-1"), _to_text(head.headers),
        )  # fmt: skip

    def _take(self, head: RequestHead, wanted: HttpRequest) -> RequestHead:
        origin = self._origin
        if (wanted.scheme, wanted.host, wanted.port) != (origin.scheme, origin.host, origin.port):
            raise _broken("it names another server: the connection is made to this one")
        try:
            method, target = wanted.method.encode("ascii"), wanted.target.encode("ascii")
            check_method(method)
            target = check_target(method, target, origin)
            headers = _framed(_to_wire(wanted.headers), head.headers, wanted.body)
            check_size(headers, target)
        except (HttpRefused, UnicodeEncodeError) as error:
            raise _broken(str(error)) from error
        return replace(head, method=method, target=target, headers=headers)


class _Both:
    """A body that goes through two filters."""

    def __init__(self, first: BodyFilter, second: BodyFilter) -> None:
        self._first = first
        self._second = second

    def feed(self, data: bytes) -> bytes:
        return self._second.feed(self._first.feed(data))

    def finish(self) -> bytes:
        return self._second.feed(self._first.finish()) + self._second.finish()


def both(first: BodyFilter | None, second: BodyFilter | None) -> BodyFilter | None:
    """Return the filter that is `first` and then `second`."""
    return _Both(first, second) if first is not None and second is not None else first or second


Message = TypeVar("Message", HttpRequest, HttpResponse)


def _chain(before: Message, after: Message) -> Message:
    """Return what a hook made of a message, going through the filters of the hooks before it first."""
    if after.body is before.body:
        return after
    return replace(after, body=both(before.body, after.body))


async def _call(calling: Awaitable[Result]) -> Result:
    try:
        async with asyncio.timeout(HOOK_TIMEOUT_S):
            return await calling
    except TimeoutError:
        raise _broken("it did not end in time") from None
    except Exception as error:
        _logger.exception("a hook failed")
        raise _broken("it failed") from error


def _checked_answer(answer: HttpAnswer) -> HookAnswer:
    if not 200 <= answer.status <= 599:
        raise _broken("its status is none of a final response")
    return HookAnswer(answer)


def _refuse(refuse: Refuse) -> Refusal:
    return Refusal(403, "egress_denied", "hook", refuse.reason, refuse.hint)


def _broken(reason: str) -> Refusal:
    return Refusal(502, "egress_denied", "hook", f"a hook's answer cannot be used: {reason}")


def _to_text(headers: Sequence[Header]) -> Fields:
    shown = without_length(headers)
    return tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in shown)


def _to_wire(fields: Fields) -> list[Header]:
    try:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
        for header in headers:
            check_header(*header)
    except (HttpRefused, UnicodeEncodeError) as error:
        raise _broken(str(error)) from error
    return [item for item in without_length(end_to_end(headers)) if item[0].lower() != b"host"]


def _framed(
    headers: list[Header], original: Sequence[Header], body: BodyFilter | None
) -> list[Header]:
    """Return a hook's headers with the length that the body has, where no filter changes it."""
    lengths = [item for item in original if item[0].lower() == b"content-length"]
    return headers if body is not None else headers + lengths
