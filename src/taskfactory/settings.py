"""The user's own settings that decide how tasks run: where the Task Factory lives, and the sandbox switch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taskfactory.sandboxconfig import SWITCH_VARIABLE

HOME_VARIABLE = "TASKFACTORY_HOME"


@dataclass(frozen=True, slots=True)
class Settings:
    """`home` is the Task Factory's directory; `sandbox_default` holds where no workspace file says otherwise."""

    home: Path
    sandbox_default: bool = False


def read_settings(environ: Mapping[str, str], user_home: Path) -> Settings:
    """Return the settings of this process's environment."""
    named = environ.get(HOME_VARIABLE, "")
    home = Path(named) if named else user_home / ".taskfactory"
    return Settings(home=home.absolute(), sandbox_default=environ.get(SWITCH_VARIABLE) == "1")
