"""taskvm: an untrusted Linux guest in a QEMU micro-VM, with mediated egress, injected secrets and served mounts.

async with Sandbox.create(mounts={"/workspace": HostDir(".")}, allow=["api.example.com"]) as vm:
    print((await vm.exec("ls -l")).stdout)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskvm.auditreading import find_audit_log, read_audit
    from taskvm.cache import Cache
    from taskvm.checkpoints.checkpoint import Checkpoint, CheckpointStore
    from taskvm.doctor import Finding, examine, render_findings
    from taskvm.egress.audit import AuditEvent
    from taskvm.egress.explanation import Explanation, Step, explain
    from taskvm.egress.oversight import (
        HttpAnswer,
        HttpHook,
        HttpRequest,
        HttpResponse,
        Oversight,
        Question,
        Refuse,
    )
    from taskvm.egress.policy import Decision, Policy
    from taskvm.egress.secret import Secret, SecretArguments
    from taskvm.egress.suggestion import Suggestion, suggest_policy
    from taskvm.errors import (
        CheckpointError,
        CommandError,
        CopyError,
        GuestError,
        GuestProtocolError,
        HostError,
        ImageError,
        NotInstalledError,
        SandboxError,
        SandboxLostError,
        SandboxStateError,
        TaskvmError,
        UnavailableError,
        UpstreamError,
        UsageError,
    )
    from taskvm.files import FileInfo, Files
    from taskvm.filewatch import FileChange, FileWatch
    from taskvm.fs.hooks import Hooks, Operation
    from taskvm.fs.hostdir import HostDir
    from taskvm.fs.hostfile import HostFile
    from taskvm.fs.memory import Memory
    from taskvm.fs.pathprovider import PathProvider, PathStat
    from taskvm.fs.provider import Provider
    from taskvm.fs.quota import Quota
    from taskvm.fs.readonly import ReadOnly
    from taskvm.fs.router import Router
    from taskvm.fs.shadow import Shadow
    from taskvm.fs.wrapper import Wrapper
    from taskvm.image.manifest import Image, ImageSpec
    from taskvm.image.store import ImageStore
    from taskvm.limits import Limits
    from taskvm.net.ingress import Forward
    from taskvm.opening import Opening
    from taskvm.paths import Removed
    from taskvm.pool import WarmPool
    from taskvm.printing import printable
    from taskvm.process import ByteStream, ExecResult, Process
    from taskvm.resources import ExecLimits, ExecUsage
    from taskvm.review.changes import Change, ChangeSet, Outcome
    from taskvm.sandbox import Sandbox
    from taskvm.secretcommand import command_output
    from taskvm.supervisor.attachment import Attachment
    from taskvm.supervisor.client import Supervisor
    from taskvm.treecopy import CopyLimits
    from taskvm.usage import Statistics
    from taskvm.wire.supervision import ExecStatus, Launch, SandboxStatus, SupervisorStatus
else:
    from taskvm.exporting import exporter

    __getattr__, __dir__ = exporter(
        __name__,
        {
            "taskvm.auditreading": "find_audit_log read_audit",
            "taskvm.cache": "Cache",
            "taskvm.checkpoints.checkpoint": "Checkpoint CheckpointStore",
            "taskvm.doctor": "Finding examine render_findings",
            "taskvm.egress.audit": "AuditEvent",
            "taskvm.egress.explanation": "Explanation Step explain",
            "taskvm.egress.oversight": "HttpAnswer HttpHook HttpRequest HttpResponse Oversight Question Refuse",
            "taskvm.egress.policy": "Decision Policy",
            "taskvm.egress.secret": "Secret SecretArguments",
            "taskvm.egress.suggestion": "Suggestion suggest_policy",
            "taskvm.errors": (
                "CheckpointError CommandError CopyError GuestError GuestProtocolError "
                "HostError ImageError NotInstalledError SandboxError SandboxLostError SandboxStateError "
                "TaskvmError UnavailableError UpstreamError UsageError"
            ),
            "taskvm.files": "FileInfo Files",
            "taskvm.filewatch": "FileChange FileWatch",
            "taskvm.fs.hooks": "Hooks Operation",
            "taskvm.fs.hostdir": "HostDir",
            "taskvm.fs.hostfile": "HostFile",
            "taskvm.fs.memory": "Memory",
            "taskvm.fs.pathprovider": "PathProvider PathStat",
            "taskvm.fs.provider": "Provider",
            "taskvm.fs.quota": "Quota",
            "taskvm.fs.readonly": "ReadOnly",
            "taskvm.fs.router": "Router",
            "taskvm.fs.shadow": "Shadow",
            "taskvm.fs.wrapper": "Wrapper",
            "taskvm.image.manifest": "Image ImageSpec",
            "taskvm.image.store": "ImageStore",
            "taskvm.limits": "Limits",
            "taskvm.net.ingress": "Forward",
            "taskvm.opening": "Opening",
            "taskvm.paths": "Removed",
            "taskvm.pool": "WarmPool",
            "taskvm.process": "ByteStream ExecResult Process",
            "taskvm.resources": "ExecLimits ExecUsage",
            "taskvm.printing": "printable",
            "taskvm.review.changes": "Change ChangeSet Outcome",
            "taskvm.sandbox": "Sandbox",
            "taskvm.secretcommand": "command_output",
            "taskvm.supervisor.attachment": "Attachment",
            "taskvm.supervisor.client": "Supervisor",
            "taskvm.treecopy": "CopyLimits",
            "taskvm.usage": "Statistics",
            "taskvm.wire.supervision": "ExecStatus Launch SandboxStatus SupervisorStatus",
        },
    )

__version__ = "0.1.0"

__all__ = [
    # Most important first; errors last, from the general to the specific.
    "Sandbox",
    "Checkpoint",
    "HostDir",
    "HostFile",
    "Secret",
    "SecretArguments",
    "command_output",
    "ExecResult",
    "ExecUsage",
    "ExecLimits",
    "Process",
    "ByteStream",
    "Files",
    "FileInfo",
    "FileWatch",
    "FileChange",
    "CopyLimits",
    "ChangeSet",
    "Change",
    "Outcome",
    "printable",
    "Policy",
    "Decision",
    "explain",
    "Explanation",
    "Step",
    "Oversight",
    "Question",
    "HttpHook",
    "HttpRequest",
    "HttpResponse",
    "HttpAnswer",
    "Refuse",
    "AuditEvent",
    "read_audit",
    "find_audit_log",
    "Suggestion",
    "suggest_policy",
    "WarmPool",
    "Limits",
    "Statistics",
    "Supervisor",
    "Attachment",
    "Launch",
    "SandboxStatus",
    "ExecStatus",
    "SupervisorStatus",
    "Provider",
    "Memory",
    "ReadOnly",
    "Shadow",
    "Router",
    "Quota",
    "Hooks",
    "Operation",
    "Wrapper",
    "PathProvider",
    "PathStat",
    "Opening",
    "Forward",
    "Image",
    "ImageSpec",
    "ImageStore",
    "CheckpointStore",
    "Cache",
    "Removed",
    "Finding",
    "examine",
    "render_findings",
    "TaskvmError",
    "UsageError",
    "HostError",
    "UnavailableError",
    "NotInstalledError",
    "ImageError",
    "CheckpointError",
    "UpstreamError",
    "SandboxError",
    "SandboxStateError",
    "SandboxLostError",
    "GuestProtocolError",
    "GuestError",
    "CopyError",
    "CommandError",
]
