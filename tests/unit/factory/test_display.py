"""taskfactory.display: what a person sees while a tool runs."""

from taskfactory.display import TextDisplay
from taskfactory.events import MAX_LINE, Status, ToolResult, ToolUpdate


def shown(*events: ToolUpdate | ToolResult | Status) -> list[str]:
    lines: list[str] = []
    display = TextDisplay(lines.append)
    for event in events:
        display.show(event)
    return [line.strip() for line in lines]


def update(text: str, call_id: str = "1") -> ToolUpdate:
    return ToolUpdate(call_id=call_id, text=text)


def test_running_output_is_shown_line_by_line_however_it_comes() -> None:
    end = ToolResult(call_id="1", tool="bash", text="a\nb\nc")

    assert shown(update("a\nb"), update("b\n"), update("c"), end) == [
        "a",
        "bb",
        "c",
        "ok     a\\nb\\nc",
    ]


def test_lines_of_calls_that_run_side_by_side_do_not_mix() -> None:
    assert shown(update("a"), update("x\n", "2"), update("b\n")) == ["x", "ab"]


def test_running_output_cannot_act_on_the_terminal() -> None:
    assert shown(update("\x1b[2J\x7f\u202e\n")) == ["\\e[2J\\x7f\\u{202e}"]


def test_a_line_without_an_end_takes_bounded_memory() -> None:
    display = TextDisplay(lambda line: None)
    for _ in range(100):
        display.show(update("x" * MAX_LINE))

    assert len(display._begun["1"]) <= MAX_LINE + 1
