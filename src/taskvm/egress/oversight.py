"""A program's own say in what leaves a sandbox: who is asked about a host, and hooks on each request.

Rule 1: rules decide first. Nobody is asked, and no hook is called, about what a rule denies.
Rule 2: what a hook changes is judged again. It sees placeholders, and never a secret's value.
Rule 3: a hook or an approver that fails, or takes too long, is a refusal.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from taskvm.errors import UsageError
from taskvm.wire.message import BodyFilter

Result = TypeVar("Result")
# Of a plain function, or of a coroutine function.
Maybe: TypeAlias = Result | Awaitable[Result]

Answer = Literal["once", "sandbox", "deny"]
Fields = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Question:
    """May this sandbox reach a host that no rule names? The request is the first that asks.

    `path` is without its query. All texts but `host` are the guest's: show them as such.
    """

    sandbox: str
    host: str
    port: int
    scheme: str
    method: str
    path: str


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request that the rules allow, as a hook sees it; `dataclasses.replace` makes another.

    `target` is the path and the query. Headers are in their order, without framing and Host. A body
    goes through `body`, when a hook sets it, as it streams.
    """

    scheme: str
    host: str
    port: int
    method: str
    target: str
    headers: Fields = ()
    body: BodyFilter | None = None


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """The head of a server's response, as a hook sees it and may change it; `body` as in `HttpRequest`."""

    status: int
    headers: Fields = ()
    body: BodyFilter | None = None


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A whole answer of a hook's own, instead of the server's."""

    status: int
    headers: Fields = ()
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class Refuse:
    """A hook's refusal: the guest gets it as JSON, like a denial of the policy."""

    reason: str
    hint: str = ""


OnRequest = Callable[[HttpRequest], Maybe[HttpRequest | HttpAnswer | Refuse | None]]
OnResponse = Callable[[HttpRequest, HttpResponse], Maybe[HttpResponse | Refuse | None]]
Approver = Callable[[Question], Maybe[Answer]]


@dataclass(frozen=True, slots=True)
class HttpHook:
    """Functions that see each request and each response; plain ones run in a thread. None: go on."""

    on_request: OnRequest | None = None
    on_response: OnResponse | None = None


@dataclass(frozen=True, slots=True)
class Oversight:
    """Who is asked about a host that no rule names, how long that may take, and the hooks, in order.

    The approver's answer is "once" (this connection), "sandbox" (a rule for its life) or "deny". What
    the guest's connection asks waits for it, `deadline_s` at most; then it is refused.
    """

    approver: Approver | None = None
    deadline_s: float = 120.0
    hooks: tuple[HttpHook, ...] = ()

    def __post_init__(self) -> None:
        if not self.deadline_s > 0:  # NaN too
            raise UsageError(f"wait {self.deadline_s} s for an approver", "it must be more than 0")
