"""How the paths that a model, a person or a task writes become paths of the place where tools act.

Rule 1: an absolute path of the host inside the workspace means the same file in the guest's mount.
        What lies under the guest's own root is the guest's, also where the workspace's directory on
        the host is called so: agents are told the guest's paths.
Rule 2: every other absolute path is the guest's own; `~` is the guest's home. The host's file system
        is never asked. A relative path begins at the guest's root, whatever its name is there.
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
            return _normal(self.home + text[1:])
        absolute = _normal(posixpath.join(self.root, text))
        for root in self._mapped_roots if text.startswith("/") else ():
            if _is_in(absolute, root):
                return self.root + absolute[len(root) :]
        return absolute

    def map_text(self, text: str) -> str:
        """Return free text with the workspace's host path replaced by its path here (rule 3)."""
        for root in self._mapped_roots:
            pattern = rf"(?<![\w./~@%+-]){re.escape(root)}(?![\w@%+~-]|\.[\w.])"
            text = re.sub(pattern, lambda _match: self.root, text)
        return text

    def show(self, path: str) -> str:
        """Return an absolute path as a person in the workspace would write it."""
        return path[len(self.root) + 1 :] if path.startswith(self.root + "/") else path

    @property
    def _mapped_roots(self) -> tuple[str, ...]:
        return tuple(root for root in self.host_roots if not _is_in(root, self.root))


def _is_in(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _normal(path: str) -> str:
    # POSIX leaves a leading `//` to the system; Linux means `/`.
    return "/" + posixpath.normpath(path).lstrip("/")


def _tidy(path: str) -> str:
    """Drop the `@` that models put before a file, and the odd spaces they copy from a screen."""
    text = "".join(" " if unicodedata.category(sign) == "Zs" else sign for sign in path)
    return text.removeprefix("@")
