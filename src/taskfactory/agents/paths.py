"""How the paths that a model, a person or a task writes become paths of the place where tools act.

Rule 1: an absolute path of the host inside the workspace means the same file in the guest's mount.
Rule 2: every other absolute path is the guest's own; `~` is the guest's home. The host's file system
        is never asked.
Rule 3: in free text (a command, a task) the workspace's host path is replaced where it stands as a
        token of its own: not preceded by a character that could belong to a path, and followed by
        `/`, by the end of a word, or by punctuation that ends a sentence.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PathMap:
    """The workspace's directory on the host and in the place where tools act, and the home there.

    `host_roots` has every spelling of the directory (as given, and with links resolved), longest first.
    """

    host_roots: tuple[str, ...]
    root: str
    home: str

    def resolve(self, path: str) -> str:
        """Return the absolute, normalised path that a tool's argument means. Raises ValueError for a NUL."""
        text = _tidy(path)
        if "\0" in text:
            raise ValueError(f"the path {path!r} holds a NUL")
        if text == "~" or text.startswith("~/"):
            text = self.home + text[1:]
        joined = posixpath.normpath(posixpath.join(self.root, text))
        # POSIX leaves a leading `//` to the system; Linux means `/`.
        absolute = "/" + joined.lstrip("/")
        for root in self.host_roots:
            if absolute == root or absolute.startswith(root + "/"):
                return self.root + absolute[len(root) :]
        return absolute

    def map_text(self, text: str) -> str:
        """Return free text with the workspace's host path replaced by its path here (rule 3)."""
        for root in self.host_roots:
            if root != self.root:
                pattern = rf"(?<![\w./~@%+-]){re.escape(root)}(?![\w@%+~-]|\.[\w.])"
                text = re.sub(pattern, lambda _match: self.root, text)
        return text

    def show(self, path: str) -> str:
        """Return an absolute path as a person in the workspace would write it."""
        return path[len(self.root) + 1 :] if path.startswith(self.root + "/") else path


def _tidy(path: str) -> str:
    """Drop the `@` that models put before a file, and the odd spaces they copy from a screen."""
    text = "".join(" " if unicodedata.category(sign) == "Zs" else sign for sign in path)
    return text.removeprefix("@")
