"""What a client can ask of the supervisor: one function for each request of `wire/supervision.py`.

An operation on a running sandbox is three small things: a `Request` there, a function here with `@operation`, and a
method of `Supervisor` in client.py. The function's result is the answer; what it raises of ours is raised in the
client. Its task is cancelled when the client leaves.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from taskvm.egress.policy import Policy
from taskvm.egress.secret import Secret, SecretArguments
from taskvm.errors import GuestError, UsageError
from taskvm.sandbox import Sandbox
from taskvm.supervisor.holding import Holding
from taskvm.supervisor.job import Job
from taskvm.supervisor.ports import Service
from taskvm.wire import supervision as messages
from taskvm.wire.supervision import ExecStatus, Request, SandboxStatus, SupervisorStatus

if TYPE_CHECKING:
    from taskvm.supervisor.server import Server

_R = TypeVar("_R", bound=Request)
Operation = Callable[["Server", Service, Any], Awaitable[object]]
OPERATIONS: dict[str, tuple[type[Request], Operation]] = {}


class AnsweredError(Exception):
    """Raised by an operation that has sent its answer itself, and whatever belonged after it."""


def operation(
    kind: type[_R],
) -> Callable[
    [Callable[[Server, Service, _R], Awaitable[object]]],
    Callable[[Server, Service, _R], Awaitable[object]],
]:
    """Register a function as the one that serves requests of `kind`."""

    def register(
        function: Callable[[Server, Service, _R], Awaitable[object]],
    ) -> Callable[[Server, Service, _R], Awaitable[object]]:
        name = kind.__struct_config__.tag
        assert isinstance(name, str), "a request has its name"
        assert name not in OPERATIONS, "an operation has one function"
        OPERATIONS[name] = (kind, function)
        return function

    return register


# The supervisor.


@operation(messages.StatusRequest)
async def status(server: Server, service: Service, request: Request) -> SupervisorStatus:
    return server.status()


@operation(messages.ShutdownRequest)
async def shutdown(server: Server, service: Service, request: Request) -> None:
    await server.shut_down()


@operation(messages.ListRequest)
async def list_(
    server: Server, service: Service, request: messages.ListRequest
) -> list[SandboxStatus]:
    return [each.status() for each in server.roster.all() if each.running or request.ended]


# A sandbox.


@operation(messages.StartRequest)
async def start(server: Server, service: Service, request: messages.StartRequest) -> SandboxStatus:
    loop = asyncio.get_running_loop()

    def progress(line: str) -> None:  # an image is built in a thread
        loop.call_soon_threadsafe(service.notify, messages.Notice(progress=line))

    recipe = server.make_recipe(request, progress)
    holding = await server.roster.start(recipe, request.name, request.launch)
    server.log.info("started %s %s", holding.vm.id, holding.name or "")
    return holding.status()


@operation(messages.StopRequest)
async def stop(server: Server, service: Service, request: messages.StopRequest) -> SandboxStatus:
    holding = server.roster.find_running(request.sandbox)
    holding.end("it was stopped")
    await holding.ended.wait()
    return holding.status()


@operation(messages.CheckpointRequest)
async def checkpoint(server: Server, service: Service, request: messages.CheckpointRequest) -> None:
    if not request.path.startswith("/"):
        raise UsageError(f"save a sandbox as {request.path}", "it is not an absolute path")
    holding = server.roster.find_running(request.sandbox)
    with holding.busy():
        await holding.vm.checkpoint(Path(request.path), memory=request.memory)
    if request.stop:
        holding.end("it was saved and stopped")
        await holding.ended.wait()


@operation(messages.PublishRequest)
async def publish(server: Server, service: Service, request: messages.PublishRequest) -> str:
    holding = server.roster.find_running(request.sandbox)
    with holding.busy():
        return await holding.publish(request.port, request.host_port)


@operation(messages.PolicyRequest)
async def policy(server: Server, service: Service, request: messages.PolicyRequest) -> str:
    holding = server.roster.find_running(request.sandbox)
    vm = holding.vm
    with holding.busy():
        wanted = vm.policy if request.file is None else Policy.from_text(request.file)
        wanted = wanted.allowing(*request.allow).denying(*request.deny)
        if wanted != vm.policy:
            vm.change_policy(wanted)
        return vm.policy.to_toml()


@operation(messages.SecretRequest)
async def secret(server: Server, service: Service, request: messages.SecretRequest) -> str:
    holding = server.roster.find_running(request.sandbox)
    with holding.busy():
        if request.value is None:
            holding.vm.revoke_secret(request.name)
            return ""
        more: SecretArguments = {"places": request.places, "shape": request.shape}
        if request.headers:
            more["headers"] = request.headers
        secret = Secret(request.name, request.value, hosts=request.hosts, **more)
        return holding.vm.put_secret(secret)


@operation(messages.CopyRequest)
async def copy(server: Server, service: Service, request: messages.CopyRequest) -> None:
    if not request.host.startswith("/"):
        raise UsageError(f"copy {request.host}", "it is not an absolute path of the host")
    holding = server.roster.find_running(request.sandbox)
    with holding.busy():
        if request.direction == "in":
            target = await _find_target(holding.vm, request) if request.into else request.guest
            await holding.vm.files.copy_in(Path(request.host), target)
        else:
            await holding.vm.files.copy_out(request.guest, Path(request.host))


async def _find_target(vm: Sandbox, request: messages.CopyRequest) -> str:
    """Return where cp(1) would copy to: beneath a directory that is there, else to the very name.

    A slash at the end says that a file's target is a directory, which is then made.
    """
    try:
        if not (await vm.files.stat(request.guest)).is_dir:
            return request.guest
    except GuestError:
        if not request.guest.endswith("/") or await asyncio.to_thread(os.path.isdir, request.host):
            return request.guest
    return f"{request.guest.rstrip('/')}/{Path(request.host).name}"


# A command.


@operation(messages.KillRequest)
async def kill(server: Server, service: Service, request: messages.KillRequest) -> None:
    holding = server.roster.find_running(request.sandbox)
    with holding.busy():
        await holding.kill(request.exec, None if request.all else request.signal)


@operation(messages.ExecRequest)
async def exec_(server: Server, service: Service, request: messages.ExecRequest) -> None:
    holding = server.roster.find_running(request.sandbox)
    job = await holding.launch(request.launch)
    await _serve(service, holding, job, lossless=not job.pty)


@operation(messages.AttachRequest)
async def attach(server: Server, service: Service, request: messages.AttachRequest) -> None:
    holding = server.roster.find(request.sandbox)
    job = holding.find(request.exec)
    if request.size is not None and job.running and job.pty:
        await job.redraw(*request.size)
    await _serve(service, holding, job, follow=request.follow)


async def _serve(
    service: Service, holding: Holding, job: Job, *, lossless: bool = False, follow: bool = True
) -> None:
    """Attach the client to `job`, and tell it the end when that is complete."""
    answer: ExecStatus = job.status(main=job is holding.main)
    service.answer(messages.Answer(result=messages.raw(answer)))
    with holding.busy():
        await job.attach(service, lossless=lossless, follow=follow)
    if job.ending is None:
        service.finish(messages.Ended(running=True))
    else:
        if job is holding.main or not holding.running:
            await holding.ended.wait()  # what it wrote to mounts is on the host then
        service.finish(job.ending)
    raise AnsweredError
