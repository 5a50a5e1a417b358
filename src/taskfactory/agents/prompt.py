"""The system prompt, built of named sections, with the paths of the place where the tools act.

It is built with the right working directory in the first place: replacing a path in a finished text
fails silently when the text changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taskfactory.agents.place import Place
from taskfactory.agents.tools import AnyTool


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """Sections in order; names are unique."""

    sections: tuple[tuple[str, str], ...]

    def with_section(self, name: str, text: str) -> SystemPrompt:
        """Return the prompt with one section replaced, or added at the end."""
        if name in dict(self.sections):
            pairs = tuple((key, text if key == name else old) for key, old in self.sections)
            return SystemPrompt(pairs)
        return SystemPrompt((*self.sections, (name, text)))

    def render(self) -> str:
        """Return the text that the model gets."""
        return "\n\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in self.sections)


def build_system_prompt(tools: Sequence[AnyTool], place: Place) -> SystemPrompt:
    """Return the prompt for these tools in this place."""
    listing = "\n".join(f"- {tool.name}: {tool.description}" for tool in tools)
    network = (
        "You work in a virtual machine of your own. It reaches only the hosts that its owner allowed;"
        " a refusal says so. Variables that look like tokens hold placeholders: use them as they are."
        if place.sandboxed
        else "You work on a person's own machine. Change nothing outside the working directory."
    )
    return SystemPrompt(
        (
            (
                "role",
                "You are a software engineer. You do the task you are given, with the tools below.",
            ),
            ("tools", listing),
            ("surroundings", network),
            ("cwd", place.paths.root),
        )
    )
