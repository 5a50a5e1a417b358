"""taskfactory.agents.loop, scripted and prompt: a session from the first prompt to the last result."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.processes import is_alive
from tests.support.waiting import until

from taskfactory.agents.loop import (
    AgentSession,
    Message,
    Prompt,
    Results,
    ToolRequest,
    Turn,
    UserCommand,
)
from taskfactory.agents.operations import Ending, OutputSink
from taskfactory.agents.paths import PathMap
from taskfactory.agents.place import Place, host_place
from taskfactory.agents.prompt import SystemPrompt, build_system_prompt
from taskfactory.agents.scripted import ScriptedModel
from taskfactory.agents.tools import builtin_tools
from taskfactory.document import parse_document
from taskfactory.errors import ConfigError, EnvironmentLost, ExtensionError, TaskFailed
from taskfactory.events import (
    AnyEvent,
    BeforeAgentStart,
    ToolCall,
    ToolResult,
    UserBash,
    UserBashResult,
)
from taskfactory.extensions import Block, Hooks, UserBashReply


def script(text: str) -> ScriptedModel:
    return ScriptedModel.from_document(parse_document(text, "script.yaml"))


class Session:
    """A session on the host, in one directory, that remembers its events."""

    def __init__(self, root: Path, place: Place | None = None) -> None:
        self.events: list[AnyEvent] = []
        self.hooks = Hooks()
        self.place = place or host_place(root)

    def open(self) -> AgentSession:
        return AgentSession(self.place, self.hooks, self.events.append)

    async def run(self, text: str, task: str = "do it") -> None:
        await self.open().run(script(text), task)

    def results(self) -> list[ToolResult]:
        return [event for event in self.events if isinstance(event, ToolResult)]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


async def test_a_script_is_played_to_its_end(session: Session, tmp_path: Path) -> None:
    await session.run("""
- text: I write a file.
  tools:
    - {tool: write, arguments: {path: a, content: hello}}
- tools:
    - tool: read
      arguments: {path: a}
      expect: {contains: [hello], not_contains: [bye], matches: "^h.*o$"}
    - tool: read
      arguments: {path: missing}
      expect: {is_error: true}
- text: Done.
""")

    assert (tmp_path / "a").read_text() == "hello"
    assert {result.call_id: result.is_error for result in session.results()} == {
        "turn1-call1": False,
        "turn2-call1": False,
        "turn2-call2": True,
    }
    names = [type(event).__name__ for event in session.events]
    assert names[0] == "BeforeAgentStart"
    assert names[-1] == "AgentText"


@pytest.mark.parametrize(
    ("expect", "says"),
    [
        ("{contains: [bye]}", r"\+ contains 'bye'"),
        ("{not_contains: [hello]}", r"- must not contain 'hello'"),
        ("{is_error: true}", r"\+ an error\n  - a success"),
        ("{matches: 'x+'}", r"\+ matches /x\+/"),
    ],
)
async def test_an_unmet_expectation_fails_the_task(
    session: Session, expect: str, says: str
) -> None:
    with pytest.raises(TaskFailed, match=rf"turn 1: bash .*\n?(?s:.*){says}(?s:.*)\| hello"):
        await session.run(
            f"- tools: [{{tool: bash, arguments: {{command: echo hello}}, expect: {expect}}}]"
        )


async def test_a_failures_text_cannot_act_on_a_terminal(session: Session) -> None:
    with pytest.raises(TaskFailed) as caught:
        await session.run(
            "- tools: [{tool: bash, arguments: {command: 'printf \"\\\\033[2J\"'}, expect: {contains: [x]}}]"
        )

    assert "\x1b" not in str(caught.value)
    assert "\\e[2J" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{}", "script.yaml:1"),
        ("- text: a\n- txet: b\n", "script.yaml:2"),
        ("- tools:\n    - {tool: a, expect: {matches: '('}}", "script.yaml:1"),
    ],
)
def test_a_wrong_script_is_refused_with_its_line(text: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        script(text)


async def test_calls_of_a_turn_run_side_by_side_and_answer_in_order(session: Session) -> None:
    # Each waits for a file that the other makes: one after the other would never end.
    await session.run("""
- tools:
    - tool: bash
      arguments: {command: "touch a; until [ -e b ]; do sleep 0.05; done; echo first", timeout: 100}
      expect: {contains: [first]}
    - tool: bash
      arguments: {command: "touch b; until [ -e a ]; do sleep 0.05; done; echo second", timeout: 100}
      expect: {contains: [second]}
""")


async def test_an_unknown_tool_is_a_result(session: Session) -> None:
    await session.run("- tools: [{tool: fly, expect: {is_error: true, contains: ['no tool', ls]}}]")


class Endless:
    """A model that never has enough."""

    async def next(self, conversation: Sequence[Message]) -> Turn | None:
        return Turn("again")


class Greedy:
    """A model that wants everything at once."""

    async def next(self, conversation: Sequence[Message]) -> Turn | None:
        return Turn(calls=(ToolRequest("1", "ls", {}),) * 1000)


@pytest.mark.parametrize("model", [Endless(), Greedy()])
async def test_an_agent_without_measure_is_ended(session: Session, model: Any) -> None:
    with pytest.raises(TaskFailed, match="not done after|at once"):
        await session.open().run(model, "x")


class LostOperations:
    """A place that is gone."""

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        cwd: str,
        on_output: OutputSink,
        timeout_s: float | None = None,
    ) -> Ending:
        raise EnvironmentLost("the sandbox is lost")


async def test_the_loss_of_the_place_ends_the_session(session: Session) -> None:
    session.hooks.replace_operations(lambda _: LostOperations())  # type: ignore[arg-type, return-value] # exec only

    with pytest.raises(EnvironmentLost):
        await session.run("- tools: [{tool: bash, arguments: {command: ls}}, {tool: ls}]")


# What the model is told...


async def test_the_model_reads_the_places_paths_and_never_the_hosts(tmp_path: Path) -> None:
    paths = PathMap(host_roots=(str(tmp_path),), root="/workspace", home="/home/user")
    place = Place(host_place(tmp_path).operations, paths, sandboxed=True, description="x")
    session = Session(tmp_path, place)

    await session.run("- text: done", task=f"Fix {tmp_path}/src/a.py, please.")

    [prompt] = [event for event in session.events if isinstance(event, BeforeAgentStart)]
    assert prompt.prompt == "Fix /workspace/src/a.py, please."
    assert "<cwd>\n/workspace\n</cwd>" in prompt.system_prompt
    assert str(tmp_path) not in prompt.system_prompt


def test_a_section_is_replaced_or_added(tmp_path: Path) -> None:
    prompt = build_system_prompt(builtin_tools(), host_place(tmp_path))

    changed = prompt.with_section("role", "A baker.").with_section("style", "Short.")

    assert [name for name, _ in changed.sections] == [
        "role",
        "tools",
        "surroundings",
        "cwd",
        "style",
    ]
    assert changed.render().startswith("<role>\nA baker.\n</role>")


async def test_a_real_model_would_get_the_whole_conversation(session: Session) -> None:
    seen: list[Sequence[Message]] = []

    class Watching:
        async def next(self, conversation: Sequence[Message]) -> Turn | None:
            seen.append(conversation)
            return Turn("look", (ToolRequest("c1", "ls", {}),)) if len(seen) == 1 else None

    await session.open().run(Watching(), "x")

    assert [type(message) for message in seen[-1]] == [Prompt, Turn, Results]


# Extensions in a session...


async def test_an_extension_blocks_a_call(session: Session, tmp_path: Path) -> None:
    async def no_writes(call: ToolCall) -> Block | None:
        return Block("read only") if call.tool == "write" else None

    session.hooks.on_tool_call(no_writes)
    await session.run("""
- tools:
    - tool: write
      arguments: {path: a, content: x}
      expect: {is_error: true, contains: [blocked, read only]}
    - {tool: ls, expect: {contains: [empty]}}
""")

    assert list(tmp_path.iterdir()) == []


async def test_an_extension_that_fails_while_it_decides_blocks(
    session: Session, tmp_path: Path
) -> None:
    async def broken(call: ToolCall) -> Block | None:
        raise RuntimeError("oops")

    session.hooks.on_tool_call(broken)
    await session.run(
        "- tools: [{tool: write, arguments: {path: a, content: x}, expect: {is_error: true, contains: [oops]}}]"
    )

    assert list(tmp_path.iterdir()) == []


async def test_an_extension_replaces_a_result_or_withholds_it(session: Session) -> None:
    async def redact(result: ToolResult) -> ToolResult | None:
        if "break" in result.text:
            raise RuntimeError("oops")
        return ToolResult(call_id=result.call_id, tool=result.tool, text="***")

    session.hooks.on_tool_result(redact)
    await session.run("""
- tools:
    - {tool: bash, arguments: {command: echo secret}, expect: {contains: ["***"]}}
    - tool: bash
      arguments: {command: echo secret break}
      expect: {is_error: true, contains: [withheld], not_contains: [secret]}
""")

    assert all("secret" not in result.text for result in session.results())


async def test_an_extension_changes_the_system_prompt(session: Session) -> None:
    async def shorter(text: str, prompt: SystemPrompt) -> SystemPrompt | None:
        return prompt.with_section("role", f"You do: {text.strip()}")

    session.hooks.on_before_agent_start(shorter)
    await session.run("- text: done", task="x")

    assert isinstance(session.events[0], BeforeAgentStart)
    assert "You do: x" in session.events[0].system_prompt


# A person's own commands...


PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"


async def test_a_model_gets_the_pictures_that_it_reads(session: Session, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    seen: list[Message] = []

    class Watched:
        async def next(self, conversation: Sequence[Message]) -> Turn | None:
            seen[:] = conversation
            return await model.next(conversation)

    model = script("- tools: [{tool: read, arguments: {path: a.png}}]")
    await session.open().run(Watched(), "look")

    [results] = [message for message in seen if isinstance(message, Results)]
    assert [(each.media_type, each.data) for each in results.results[0].images] == [
        ("image/png", PNG)
    ]


async def test_a_withheld_result_has_no_picture(session: Session, tmp_path: Path) -> None:
    async def broken(result: ToolResult) -> None:
        raise RuntimeError("oops")

    (tmp_path / "a.png").write_bytes(PNG)
    session.hooks.on_tool_result(broken)
    await session.run("- tools: [{tool: read, arguments: {path: a.png}}]")

    assert session.results()[0].is_error
    assert session.results()[0].images == ()


async def test_a_persons_command_runs_where_the_tools_act(session: Session, tmp_path: Path) -> None:
    reply = await session.open().user_bash("pwd; exit 3")

    assert reply == UserBashReply(str(tmp_path), 3)
    assert session.events == [
        UserBash(command="pwd; exit 3", cwd=str(tmp_path)),
        UserBashResult(command="pwd; exit 3", text=str(tmp_path), exit_code=3),
    ]


async def test_a_script_has_a_persons_commands_which_the_model_reads_of(session: Session) -> None:
    text = """
- text: What is here?
  user_bash:
    - {command: echo mine > a; cat a, expect: {contains: [mine]}}
    - {command: exit 4, expect: {is_error: true}}
  tools: [{tool: ls, expect: {contains: [a]}}]
- {}
"""
    seen: list[Message] = []

    class Watched:
        async def next(self, conversation: Sequence[Message]) -> Turn | None:
            seen[:] = conversation
            return await model.next(conversation)

    model = script(text)
    await session.open().run(Watched(), "do it")

    commands = [message for message in seen if isinstance(message, UserCommand)]
    assert [(each.command, each.reply.exit_code) for each in commands] == [
        ("echo mine > a; cat a", 0),
        ("exit 4", 4),
    ]


async def test_a_persons_command_that_answers_otherwise_fails_the_script(session: Session) -> None:
    with pytest.raises(TaskFailed, match=r"turn 1: ! echo x did not answer"):
        await session.run("- user_bash: [{command: echo x, expect: {contains: [y]}}]")


async def test_a_persons_command_that_cannot_be_started_is_answered(
    session: Session, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    place = host_place(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    reply = await AgentSession(place, session.hooks, session.events.append).user_bash("true")

    assert reply.exit_code == 126
    assert "No such file" in reply.output


async def test_an_extension_answers_a_persons_command(session: Session, tmp_path: Path) -> None:
    async def answer(event: UserBash) -> UserBashReply | None:
        return UserBashReply("no", 1)

    session.hooks.on_user_bash(answer)

    assert await session.open().user_bash("touch a") == UserBashReply("no", 1)
    assert list(tmp_path.iterdir()) == []


async def test_a_failing_handler_keeps_a_persons_command_from_running(
    session: Session, tmp_path: Path
) -> None:
    async def broken(event: UserBash) -> UserBashReply | None:
        raise RuntimeError("oops")

    session.hooks.on_user_bash(broken)

    with pytest.raises(ExtensionError, match="oops"):
        await session.open().user_bash("touch a")
    assert list(tmp_path.iterdir()) == []


async def test_cancelling_a_session_ends_its_commands(session: Session, tmp_path: Path) -> None:
    command = "echo $$ > next; mv next pid; exec sleep 600"
    running = asyncio.get_running_loop().create_task(
        session.run(f"- tools: [{{tool: bash, arguments: {{command: '{command}'}}}}]")
    )
    await until((tmp_path / "pid").exists)
    running.cancel()
    await asyncio.wait([running])

    assert running.cancelled()
    process = int((tmp_path / "pid").read_text())
    await until(lambda: not is_alive(process))
