"""Tasks in a real guest: the seven tools, the workspace, and what stays on the host (taskfactory.sandboxing)."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.processes import children_of

from taskfactory.agents.loop import AgentSession
from taskfactory.agents.place import Place
from taskfactory.agents.scripted import ScriptedModel
from taskfactory.attachments import read_attachments
from taskfactory.document import parse_document
from taskfactory.errors import EnvironmentLost, OperationError
from taskfactory.events import AnyEvent, BeforeAgentStart, ToolCall, ToolResult, UserBash
from taskfactory.extensions import Hooks, UserBashReply
from taskfactory.runner import Summary, run_task
from taskfactory.sandboxconfig import SandboxConfig
from taskfactory.sandboxing import open_place
from taskfactory.task import Task
from taskfactory.taskfile import load
from taskvm import Sandbox

pytestmark = pytest.mark.vm

ON = SandboxConfig(enabled=True)


def script(text: str) -> ScriptedModel:
    return ScriptedModel.from_document(parse_document(text, "script.yaml"))


async def run(workspace: Path, text: str, config: SandboxConfig = ON, words: str = "") -> Summary:
    events: list[AnyEvent] = []
    opening = open_place(
        config, workspace, audit_path=workspace.parent / "audit.jsonl", say=lambda text: None
    )
    task = Task(id="A-1", title="Try", description=words)
    summary = await run_task(task, opening, script(text), Hooks(), events.append)
    assert summary.outcome == "success", summary.error
    return summary


@pytest.fixture
async def place(workspace: Path) -> AsyncIterator[Place]:
    opening = open_place(
        ON, workspace, audit_path=workspace.parent / "audit.jsonl", say=lambda text: None
    )
    async with opening as opened:
        yield opened


async def test_find_leaves_out_in_the_guest_what_git_ignores_there(workspace: Path) -> None:
    """A repository of the host, which the guest's git takes for its user's own."""
    subprocess.run(["git", "init", "-q", workspace], check=True)
    (workspace / ".gitignore").write_text("node_modules/\n/result\n")
    (workspace / "node_modules").mkdir()
    for name in ("node_modules/tool", "result", "kept"):
        (workspace / name).symlink_to("nowhere")

    await run(
        workspace,
        """
- tools:
    - {tool: find, arguments: {pattern: "**"}, expect: {matches: '^.gitignore\\nkept$'}}
""",
    )


async def test_the_seven_tools_act_in_the_guest_on_the_hosts_workspace(workspace: Path) -> None:
    (workspace / "src").mkdir()
    (workspace / "src" / "calc.py").write_text("def add(a, b):\n    return a - b\n")

    summary = await run(
        workspace,
        """
- tools:
    - {tool: ls, expect: {contains: [src/]}}
    - {tool: find, arguments: {pattern: "*.py"}, expect: {contains: [src/calc.py]}}
    - {tool: grep, arguments: {pattern: "return"}, expect: {contains: ["src/calc.py:2:     return a - b"]}}
    - {tool: read, arguments: {path: src/calc.py}, expect: {contains: [def add]}}
- tools:
    - tool: edit
      arguments: {path: src/calc.py, oldText: a - b, newText: a + b}
    - tool: write
      arguments: {path: new/dir/note.txt, content: written in the guest}
- tools:
    - tool: bash
      arguments: {command: "pwd; cd src; python3 -c 'import calc; print(calc.add(2, 3))'"}
      expect: {matches: '^/workspace\\n5$'}
""",
    )

    assert (workspace / "src" / "calc.py").read_text() == "def add(a, b):\n    return a + b\n"
    assert (workspace / "new" / "dir" / "note.txt").read_text() == "written in the guest"
    assert summary.sandboxed
    assert summary.tool_errors == 0


async def test_a_persons_command_runs_in_the_guest_too(workspace: Path) -> None:
    """`!command`, from a script and through the session that whoever runs the task is handed."""
    sessions: list[AgentSession] = []
    events: list[AnyEvent] = []
    replies: list[UserBashReply] = []

    def emit(event: AnyEvent) -> None:
        events.append(event)

    async def ask(event: ToolCall) -> None:
        replies.append(await sessions[0].user_bash(f"cat /etc/hostname {workspace}/a"))

    hooks = Hooks()
    hooks.on_tool_call(ask)
    (workspace / "a").write_text("the workspace's file")
    opening = open_place(
        ON, workspace, audit_path=workspace.parent / "audit.jsonl", say=lambda text: None
    )
    model = script("""
- user_bash:
    - {command: "pwd; cat /etc/hostname; touch made", expect: {matches: '^/workspace\\nsandbox-'}}
  tools: [{tool: ls, expect: {contains: [made]}}]
""")
    summary = await run_task(
        Task(id="A-1"), opening, model, hooks, emit, on_session=sessions.append
    )

    assert summary.ok, summary.error
    assert (workspace / "made").exists()
    assert replies[0].output.startswith("sandbox-")
    assert replies[0].output.endswith("the workspace's file")
    assert {event.cwd for event in events if isinstance(event, UserBash)} == {"/workspace"}


async def test_the_hosts_path_of_the_workspace_means_the_guests(workspace: Path) -> None:
    (workspace / "a").write_text("hello")

    await run(
        workspace,
        f"""
- tools:
    - {{tool: read, arguments: {{path: {workspace}/a}}, expect: {{contains: [hello]}}}}
    - {{tool: bash, arguments: {{command: cat {workspace}/a}}, expect: {{contains: [hello]}}}}
""",
    )


async def test_a_host_file_outside_the_workspace_is_not_there(workspace: Path) -> None:
    canary = workspace.parent / "canary"
    canary.write_text("the host's own words")

    await run(
        workspace,
        f"""
- tools:
    - {{tool: read, arguments: {{path: {canary}}}, expect: {{is_error: true, not_contains: [own words]}}}}
    - {{tool: read, arguments: {{path: ../canary}}, expect: {{is_error: true, not_contains: [own words]}}}}
    - tool: bash
      arguments: {{command: "cat {canary} || cat /workspace/../canary"}}
      expect: {{is_error: true, not_contains: [own words]}}
    - {{tool: read, arguments: {{path: /etc/hostname}}, expect: {{matches: '^sandbox-'}}}}
""",
    )


async def test_a_link_out_of_the_workspace_leads_into_the_guest(workspace: Path) -> None:
    canary = workspace.parent / "canary"
    canary.write_text("the host's own words")
    (workspace / "link").symlink_to(canary)

    await run(
        workspace,
        """
- tools:
    - {tool: read, arguments: {path: link}, expect: {is_error: true, not_contains: [own words]}}
    - {tool: write, arguments: {path: link, content: overwritten}}
""",
    )

    assert canary.read_text() == "the host's own words"


async def test_nothing_of_the_hosts_environment_is_in_the_guest(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOST_ONLY", "the host's own words")

    await run(
        workspace,
        "- tools: [{tool: bash, arguments: {command: env}, expect: {not_contains: [HOST_ONLY, own words]}}]",
    )


async def test_a_commit_made_in_the_guest_is_on_the_host(workspace: Path) -> None:
    subprocess.run(["git", "init", "-q", "-b", "main", str(workspace)], check=True)
    (workspace / "a").write_text("x")

    await run(
        workspace,
        """
- tools:
    - tool: bash
      arguments:
        command: git add a && git -c user.name=Agent -c user.email=agent@test.invalid commit -q -m "From the guest"
""",
    )

    log = ["git", "-C", str(workspace), "log", "--format=%an: %s"]
    assert subprocess.run(log, capture_output=True, text=True).stdout == "Agent: From the guest\n"


async def test_a_workspace_for_review_stays_and_gets_a_patch(workspace: Path) -> None:
    """What the task did is beside its record, for a person; the workspace is as it was."""
    (workspace / "note").write_text("old\n")

    await run(
        workspace,
        "- tools: [{tool: bash, arguments: {command: 'echo new > note; echo more > made'}}]",
        SandboxConfig(enabled=True, workspace_mode="review"),
    )

    assert sorted(path.name for path in workspace.iterdir()) == ["note"]
    assert (workspace / "note").read_text() == "old\n"
    apply = ["git", "apply", str(workspace.parent / "changes.patch")]
    subprocess.run(apply, cwd=workspace, check=True)
    assert (workspace / "note").read_text() == "new\n"
    assert (workspace / "made").read_text() == "more\n"


async def test_a_tasks_attachments_are_in_the_guest_and_the_prompt(workspace: Path) -> None:
    stored = workspace.parent / "attachments" / "1a2b3c4d.csv"
    stored.parent.mkdir()
    stored.write_bytes(b"a,b\n\xff")
    (workspace.parent / "task.yaml").write_text(
        "{id: A-1, attachments: [{id: x, filename: the data.csv, storedName: 1a2b3c4d.csv}]}"
    )
    file = load(workspace.parent / "task.yaml")
    events: list[AnyEvent] = []
    opening = open_place(
        ON, workspace, audit_path=workspace.parent / "audit.jsonl", say=lambda text: None
    )
    model = script("""
- tools:
    - {tool: read, arguments: {path: /tmp/attachments/1a2b3c4d.csv}, expect: {contains: ["a,b"]}}
    - {tool: bash, arguments: {command: sha256sum /tmp/attachments/* && echo more >> /tmp/attachments/1a2b3c4d.csv}}
""")

    summary = await run_task(
        file.task, opening, model, Hooks(), events.append, attachments=read_attachments(file)
    )

    assert (summary.ok, summary.tool_errors) == (True, 0), summary.error
    [prompt] = [event.prompt for event in events if isinstance(event, BeforeAgentStart)]
    assert "## Attachments\n- the data.csv (application/octet-stream, 5 bytes): " in prompt
    assert prompt.rstrip().endswith("/tmp/attachments/1a2b3c4d.csv")
    digest = hashlib.sha256(b"a,b\n\xff").hexdigest()
    assert any(digest in event.text for event in events if isinstance(event, ToolResult))
    assert stored.read_bytes() == b"a,b\n\xff"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_review_that_is_ended_by_a_signal_keeps_its_changes(
    workspace: Path, number: signal.Signals
) -> None:
    """SIGHUP twice, as a closing terminal and its shell send it."""
    root = workspace.parent
    (root / "task.yaml").write_text("id: A-1\n")
    (root / "sandbox.json").write_text('{"enabled": true, "workspaceMode": "review"}')
    (root / "task.script.yaml").write_text(
        "- tools: [{tool: bash, arguments: {command: 'echo new > made; echo at work; sleep 600'}}]"
    )
    command = [
        *(sys.executable, "-c", "from taskfactory.cli import main; main()", "run"),
        *(str(root / "task.yaml"), "--workspace", str(workspace)),
        *("--sandbox-config", str(root / "sandbox.json")),
    ]
    environment = {**os.environ, "TASKFACTORY_HOME": str(root / "home")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        before = list(iter(lambda: next(process.stdout).strip(), "at work"))
        process.send_signal(number)
        process.send_signal(number)
        after = process.stdout.read()

    assert process.returncode == 130, before
    assert "session  over: cancelled" in after
    [patch] = (root / "home" / "sessions").glob("*/changes.patch")
    assert "+new" in patch.read_text()
    assert list(workspace.iterdir()) == []


async def test_ls_of_many_links_says_where_they_lead(workspace: Path) -> None:
    for number in range(500):
        (workspace / f"link{number}").symlink_to("/usr" if number % 2 else "/etc/hostname")

    await run(
        workspace,
        "- tools: [{tool: ls, expect: {contains: [link498, link499/], not_contains: [link498/]}}]",
    )


async def test_a_denied_host_is_in_the_summary(workspace: Path) -> None:
    summary = await run(
        workspace,
        """
- tools:
    - tool: bash
      arguments: {command: "curl -sS --max-time 20 https://not-allowed.test/"}
      expect: {is_error: true}
""",
    )

    assert [refusal.target.partition(":")[0] for refusal in summary.refusals] == [
        "not-allowed.test"
    ]
    assert all(refusal.reason for refusal in summary.refusals)


async def test_cut_output_is_kept_where_the_tools_can_read_it(place: Place) -> None:
    events: list[AnyEvent] = []
    session = AgentSession(place, Hooks(), events.append)

    await session.run(
        script("""
- tools: [{tool: bash, arguments: {command: seq 1 5000}, expect: {contains: [All of the output]}}]
- tools:
    - tool: bash
      arguments: {command: "head -n 2 /tmp/taskfactory-bash-*.log"}
      expect: {matches: '^1\\n2$'}
"""),
        "x",
    )

    [path] = [
        e.details["fullOutputPath"] for e in events if isinstance(e, ToolResult) and e.details
    ]
    assert not Path(path).exists()


async def test_a_timeout_ends_everything_the_command_started(place: Place) -> None:
    session = AgentSession(place, Hooks(), lambda event: None)

    await session.run(
        script("""
- tools:
    - tool: bash
      arguments: {command: "(setsid sleep 987 &) ; echo out; sleep 600", timeout: 6}
      expect: {is_error: true, contains: [out, timeout]}
- tools:
    - tool: bash
      arguments: {command: "while pgrep -f 'sleep [9]87' > /dev/null; do sleep 0.1; done; pgrep -x init"}
      expect: {matches: '^1$'}
"""),
        "x",
    )


async def test_a_refusal_has_the_guests_errno(place: Place) -> None:
    with pytest.raises(OperationError) as caught:
        await place.operations.read_bytes("/no/such/file")

    assert caught.value.errno == 2


async def test_a_write_keeps_the_mode_and_follows_a_link(workspace: Path, place: Place) -> None:
    (workspace / "run").write_text("old")
    (workspace / "run").chmod(0o755)
    (workspace / "link").symlink_to("run")

    await place.operations.write_bytes("/workspace/link", b"new")

    assert (workspace / "link").is_symlink()
    assert (workspace / "run").read_text() == "new"
    assert (workspace / "run").stat().st_mode & 0o777 == 0o755


async def test_a_cancelled_run_releases_its_sandbox(workspace: Path) -> None:
    at_work = asyncio.Event()
    opening = open_place(
        ON, workspace, audit_path=workspace.parent / "audit.jsonl", say=lambda text: None
    )

    def emit(event: AnyEvent) -> None:
        if isinstance(event, ToolCall):
            at_work.set()

    model = script("- tools: [{tool: bash, arguments: {command: sleep 600}}]")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(
            run_task(Task(id="A-1"), opening, model, Hooks(), emit), name="run"
        )
        await at_work.wait()
        during = _own_guests()
        running.cancel()

    assert running.cancelled()
    assert (during, _own_guests()) == (1, 0)


async def test_a_released_sandbox_is_a_lost_place(workspace: Path) -> None:
    opening = open_place(
        ON, workspace, audit_path=workspace.parent / "audit.jsonl", say=lambda text: None
    )
    async with opening as place:
        operations = place.operations

    with pytest.raises(EnvironmentLost):
        await operations.stat("/workspace")


def test_the_demonstration_proves_itself() -> None:
    """A bug fixed and committed in the guest, a secret used and not seen, attacks refused: from host evidence."""
    demo = Path(__file__).parents[2] / "examples" / "demo" / "run"
    done = subprocess.run([sys.executable, str(demo)], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "All of it holds." in done.stdout


def _own_guests() -> int:
    """How many QEMU processes are children of this process."""
    found = 0
    for pid in children_of(os.getpid()):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found += "qemu" in Path(f"/proc/{pid}/cmdline").read_text()
    return found


@pytest.mark.parametrize("memory", [False, True])
async def test_a_task_starts_from_a_checkpoint_of_the_store(workspace: Path, memory: bool) -> None:
    """What was set up once is there, with the task's own workspace."""
    async with Sandbox.create() as vm:
        await vm.exec("echo set up > /var/tmp/tool", check=True)
        checkpoint = await vm.checkpoint(f"tools-{memory}", memory=memory)

    try:
        await run(
            workspace,
            """
- tools:
    - tool: bash
      arguments: {command: cat /var/tmp/tool | tee here.txt}
      expect: {contains: [set up]}
""",
            SandboxConfig(enabled=True, checkpoint_path=checkpoint.name),
        )
    finally:
        checkpoint.delete()

    assert (workspace / "here.txt").read_text() == "set up\n"
