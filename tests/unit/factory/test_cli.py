"""taskfactory.cli: `taskfactory run` as a person runs it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.waiting import PATIENCE_S


class Shell:
    """A directory with a workspace, a task and a script, and the command run on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.workspace = root / "workspace"
        self.workspace.mkdir()
        self.task = root / "task.yaml"
        self.task.write_text("id: A-1\ntitle: Try\n")
        self.script = root / "script.yaml"
        self.script.write_text("- tools: [{tool: write, arguments: {path: a, content: x}}]\n")
        self.environment = {**os.environ, "TASKFACTORY_HOME": str(root / "home")}
        self.environment.pop("PI_FACTORY_SANDBOX", None)

    def command(self, *options: str) -> list[str]:
        return [*self.bare(), "--agent", str(self.script), *options]

    def bare(self) -> list[str]:
        return [
            *(sys.executable, "-c", "from taskfactory.cli import main; main()", "run"),
            *(str(self.task), "--workspace", str(self.workspace)),
        ]

    def run(self, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **environ}
        return subprocess.run(
            self.command(*options),
            capture_output=True,
            text=True,
            env=environment,
            timeout=PATIENCE_S,
        )


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_a_task_is_done_and_the_summary_says_where(shell: Shell) -> None:
    done = shell.run()

    assert done.returncode == 0, done.stderr
    assert (shell.workspace / "a").read_text() == "x"
    assert "place    on the host, NOT sandboxed" in done.stdout
    assert "task     A-1: success" in done.stdout
    assert "tools    1 calls, 0 errors" in done.stdout


def test_a_task_has_its_script_beside_it(shell: Shell) -> None:
    shell.script.rename(shell.root / "task.script.yaml")

    done = subprocess.run(shell.bare(), capture_output=True, text=True, env=shell.environment)

    assert done.returncode == 0, done.stderr
    assert (shell.workspace / "a").read_text() == "x"


def test_a_task_without_an_agent_is_refused_with_what_to_do(shell: Shell) -> None:
    done = subprocess.run(shell.bare(), capture_output=True, text=True, env=shell.environment)

    assert done.returncode == 2
    assert f"Write the agent's script to {shell.root}/task.script.yaml" in done.stderr


def test_a_script_beside_a_task_in_the_workspace_is_refused(shell: Shell) -> None:
    """An agent could have written it."""
    shell.task = shell.task.rename(shell.workspace / "task.yaml")
    shell.script.rename(shell.workspace / "task.script.yaml")

    done = subprocess.run(shell.bare(), capture_output=True, text=True, env=shell.environment)

    assert done.returncode == 2
    assert "it lies in the workspace" in done.stderr


def test_what_a_command_writes_is_shown_while_it_runs(shell: Shell) -> None:
    """All of it, where the result's line has its beginning only."""
    shell.script.write_text(
        "- tools: [{tool: bash, arguments: {command: 'seq 1 500; printf \"\\e[2Jend\"'}}]\n"
    )

    lines = [line.strip() for line in shell.run().stdout.splitlines()]

    assert [line for line in lines if line.isdigit()] == [str(n) for n in range(1, 501)]
    assert "\\e[2Jend" in lines


def test_json_lines_are_events_and_the_summary(shell: Shell) -> None:
    lines = [json.loads(line) for line in shell.run("--json").stdout.splitlines()]

    assert [line["event"] for line in lines] == [
        "session_start",
        "before_agent_start",
        "tool_call",
        "tool_result",
        "session_shutdown",
        "summary",
    ]
    [record] = (shell.root / "home" / "sessions").iterdir()
    recorded = (record / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in recorded] == lines[:-1]


def test_a_task_that_fails_exits_with_1(shell: Shell) -> None:
    shell.script.write_text("- tools: [{tool: ls, expect: {contains: [nothing like it]}}]\n")

    done = shell.run()

    assert done.returncode == 1
    assert "contains 'nothing like it'" in done.stderr
    assert "task     A-1: failure" in done.stdout


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("task", "title: no id\n", "task.yaml:1"),
        (
            "task",
            "id: A\nsandbox: {allowedHosts: [a.test]}\n",
            "task.yaml:2: sandbox.allowedHosts[0]",
        ),
        ("script", "x: 1\n", "script.yaml:1"),
    ],
)
def test_a_wrong_file_exits_with_2_and_its_line(
    shell: Shell, name: str, text: str, says: str
) -> None:
    getattr(shell, name).write_text(text)

    done = shell.run()

    assert done.returncode == 2
    assert says in done.stderr
    assert list(shell.workspace.iterdir()) == []


def test_a_missing_attachment_exits_with_2_before_anything_happens(shell: Shell) -> None:
    shell.task.write_text("id: A\nattachments: [{id: x, filename: y, storedName: z.png}]\n")

    done = shell.run()

    assert done.returncode == 2
    assert "task.yaml:2: attachments[0]: the attachment 'z.png' cannot be used" in done.stderr
    assert list(shell.workspace.iterdir()) == []


def test_wrong_usage_exits_with_2(shell: Shell) -> None:
    assert shell.run("--what").returncode == 2


@pytest.mark.parametrize("option", ["--sandbox-config", "--extension"])
def test_files_that_decide_are_not_taken_from_the_workspace(shell: Shell, option: str) -> None:
    inside = shell.workspace / "x.py"
    inside.write_text("{}")

    done = shell.run(option, str(inside))

    assert done.returncode == 2
    assert "it lies in the workspace" in done.stderr


def test_a_broken_extension_ends_the_run_before_anything_happens(shell: Shell) -> None:
    extension = shell.root / "ext.py"
    extension.write_text("import no_such_module\n")

    done = shell.run("--extension", str(extension))

    assert done.returncode == 2
    assert "no_such_module" in done.stderr
    assert list(shell.workspace.iterdir()) == []


def test_an_extension_takes_part(shell: Shell) -> None:
    extension = shell.root / "ext.py"
    extension.write_text(
        "from taskfactory.extensions import Block\n"
        "def register(hooks):\n"
        "    @hooks.on_tool_call\n"
        "    async def no(call):\n"
        "        return Block('not today')\n"
    )

    assert "not today" in shell.run("--extension", str(extension)).stdout
    assert list(shell.workspace.iterdir()) == []


@pytest.mark.parametrize("environ", [{"PI_FACTORY_SANDBOX": "1"}, {}])
def test_a_demanded_sandbox_that_cannot_start_runs_nothing(
    shell: Shell, environ: dict[str, str]
) -> None:
    if not environ:
        shell.task.write_text("id: A-1\nsandbox: {enabled: true}\n")

    done = shell.run(PATH=str(shell.root), **environ)

    assert done.returncode == 1
    assert "Nothing was run on the host" in done.stderr
    assert "task     A-1: refused" in done.stdout
    assert list(shell.workspace.iterdir()) == []


@pytest.mark.parametrize("key", ["imagePath", "checkpointPath"])
def test_a_task_cannot_reach_the_host_by_what_it_starts_from(shell: Shell, key: str) -> None:
    """Though its workspace allows the host, for want of QEMU."""
    shell.task.write_text(f"id: A-1\nsandbox: {{{key}: nosuch}}\n")
    config = shell.root / "sandbox.json"
    config.write_text('{"enabled": true, "onUnavailable": "host"}')

    with_qemu = shell.run("--sandbox-config", str(config))
    without = shell.run("--sandbox-config", str(config), PATH=str(shell.root))

    assert [done.returncode for done in (with_qemu, without)] == [1, 1]
    assert "task     A-1: refused" in with_qemu.stdout
    assert list(shell.workspace.iterdir()) == []


def test_output_of_an_agent_cannot_act_on_the_terminal(shell: Shell) -> None:
    shell.task.write_text('id: "A\\e[31m"\ntitle: t\n')
    shell.script.write_text(
        '- text: "\\e]0;pwned\\a"\n  tools: [{tool: ls, expect: {contains: ["\\e"]}}]\n'
    )

    done = shell.run()

    assert done.returncode == 1
    assert "\x1b" not in done.stdout + done.stderr
    assert "\\e]0;pwned" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_cleanly(shell: Shell, number: signal.Signals) -> None:
    shell.script.write_text(
        "- tools: [{tool: bash, arguments: {command: 'touch up; sleep 600; touch late'}}]\n"
    )
    process = subprocess.Popen(
        shell.command(),
        env=shell.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (shell.workspace / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)

    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 130
    assert "session  over: cancelled" in output
    assert "Traceback" not in errors


def test_a_run_under_nohup_outlives_its_terminal(shell: Shell) -> None:
    shell.script.write_text("- tools: [{tool: bash, arguments: {command: 'kill -HUP $PPID'}}]\n")
    command = shlex.join(shell.command())

    done = subprocess.run(
        ["bash", "-c", f"trap '' HUP; {command}"],
        capture_output=True,
        text=True,
        env=shell.environment,
        timeout=PATIENCE_S,
    )

    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_ends_the_run_quietly(shell: Shell) -> None:
    """`taskfactory run … | head -1`: no traceback, and the code of any program in such a pipe."""
    command = "until [ -e left ]; do sleep 0.05; done"
    shell.script.write_text(f'- tools: [{{tool: bash, arguments: {{command: "{command}"}}}}]\n')
    process = subprocess.Popen(
        shell.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=shell.environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"session")

    process.stdout.close()
    (shell.workspace / "left").touch()

    assert process.wait(timeout=PATIENCE_S) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_output_that_cannot_be_written_is_one_line(shell: Shell) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            shell.command(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=shell.environment,
            timeout=PATIENCE_S,
        )

    assert done.returncode == 1
    assert done.stderr.startswith("write the output: No space left on device")
    assert done.stderr.count("\n") == 1


def test_a_home_that_cannot_be_written_is_one_line(shell: Shell) -> None:
    done = shell.run(TASKFACTORY_HOME="/proc/nowhere")

    assert done.returncode == 1
    assert done.stderr.startswith("write the session's record below /proc/nowhere")
    assert done.stderr.count("\n") == 1


def test_the_usual_questions_are_answered() -> None:
    """-h and --version, as every command has them."""
    program = [sys.executable, "-c", "from taskfactory.cli import main; main()"]

    helped = subprocess.run(
        [*program, "run", "-h"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    version = subprocess.run(
        [*program, "--version"], capture_output=True, text=True, timeout=PATIENCE_S
    )

    assert "--sandbox-config" in helped.stdout
    assert version.returncode == 0
