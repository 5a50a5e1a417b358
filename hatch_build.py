"""What hatchling does besides when it makes a wheel: the native programs go into it. Who installs it needs no compiler.

The guest's agent is there for both architectures where `.venv` has a cross compiler (scripts/build-native). The
supervisor that QEMU runs under is this host's, so the wheel is for hosts of its architecture. All are static: any libc
will do.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativePrograms(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # of a checkout, where scripts/setup builds them
            return
        subprocess.run([Path(self.root, "scripts", "build-native")], check=True)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux2014_{platform.machine()}"
