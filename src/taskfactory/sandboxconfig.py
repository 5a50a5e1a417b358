"""What a task's sandbox may do: the workspace's file and the task's wishes, merged into one value.

Rule 1: a workspace's file (`sandbox.json`, the user's, outside the workspace) decides. A task is
        written by agents too: it adds hosts within the workspace's ceiling (its own list and its
        `taskMayAllow` patterns), narrows secrets the workspace declares, and names images by their
        store name. It never switches a demanded sandbox off.
Rule 2: a missing or empty list allows nothing.
Rule 3: a secret goes only to hosts that are allowed.
Rule 4: unknown keys and wrong types are errors, and every error is reported, not only the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import msgspec

from taskfactory.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]
OnUnavailable = Literal["refuse", "host"]
WorkspaceMode = Literal["direct", "review"]
SecretPlace = Literal["query", "path", "body"]  # of a request, besides its headers

SWITCH_VARIABLE = "PI_FACTORY_SANDBOX"

_TASK_KEYS = ("enabled", "allowedHosts", "secrets", "imagePath", "checkpointPath")
_WORKSPACE_KEYS = (
    *_TASK_KEYS, "taskMayAllow", "onUnavailable", "allowedAddresses", "resolve", "extraCaFiles",
    "hiddenFiles", "privateFiles", "passthrough", "workspaceMode",
)  # fmt: skip
_SECRET_KEYS = ("hosts", "envVar", "headers", "places", "shape")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
# A name in the image store, with an optional tag: never a path, so never a file an agent wrote.
_STORE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(?:[:@][A-Za-z0-9._:-]{1,127})?\Z")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)\Z")


@dataclass(frozen=True, slots=True)
class Source:
    """The part of a file that speaks of a sandbox. `where` gives `file:line` of a key of the whole file."""

    data: object
    where: Callable[[KeyPath], str]
    prefix: KeyPath = ()


class SandboxSecret(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Where a secret may be sent, and the host's environment variable that holds its value.

    `headers`, `places` and `shape` are the engine's: the headers it may stand in (none: those that carry keys), where
    else, and what the guest sees.
    """

    hosts: tuple[str, ...]
    env_var: str
    headers: tuple[str, ...] = ()
    places: tuple[SecretPlace, ...] = ()
    shape: str = ""


class SandboxConfig(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What one task's sandbox may do.

    `image_path` is a name or digest of the image store, never a path; `checkpoint_path` a name of the checkpoint
    store, or the user's own absolute path.
    """

    enabled: bool = False
    allowed_hosts: tuple[str, ...] = ()
    secrets: dict[str, SandboxSecret] = {}
    image_path: str | None = None
    checkpoint_path: str | None = None
    task_may_allow: tuple[str, ...] = ()
    on_unavailable: OnUnavailable = "refuse"
    allowed_addresses: tuple[str, ...] = ()
    resolve: dict[str, str] = {}
    extra_ca_files: tuple[str, ...] = ()
    hidden_files: tuple[str, ...] = ()
    private_files: tuple[str, ...] = ()
    passthrough: tuple[str, ...] = ()
    workspace_mode: WorkspaceMode = "direct"


def merge_sandbox(
    *, workspace: Source | None, task: Source | None, env_default: bool
) -> SandboxConfig:
    """Return what a task gets. Raises ConfigError with everything that is wrong in either file.

    `env_default` is the switch for a workspace whose file does not say whether it wants a sandbox.
    """
    problems: list[Problem] = []
    ceiling = _read_workspace(_Reader(workspace, problems), env_default=env_default)
    merged = _apply_task(_Reader(task, problems), ceiling)
    if problems:
        raise ConfigError(problems)
    return merged


class HostPattern(msgspec.Struct, frozen=True):
    """A host, or with `wildcard` every subdomain of it; `port` None is every port.

    Strict on purpose: what it cannot read is refused here, and the engine reads it once more.
    """

    host: str
    wildcard: bool = False
    port: str | None = None

    @classmethod
    def parse(cls, text: str) -> HostPattern:
        """Read `api.example.com`, `*.example.com`, an IPv4 address, each with `:port`. Raises ValueError."""
        host, colon, port = text.lower().rstrip(".").partition(":")
        if colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("what follows the colon is not a port")
        wildcard = host.startswith("*.")
        host = host.removeprefix("*.")
        labels = host.split(".")
        if wildcard and len(labels) < 2:
            raise ValueError("a wildcard needs a domain of two labels or more, as in *.example.com")
        if not all(_LABEL.match(label) for label in labels):
            raise ValueError(
                "write a host, such as api.example.com, or *.example.com; no scheme, no path"
            )
        return cls(host, wildcard, port or None)

    def covers(self, other: HostPattern) -> bool:
        """Say whether everything that `other` means belongs to this pattern too."""
        if self.port not in (None, other.port):
            return False
        if not self.wildcard:
            return not other.wildcard and other.host == self.host
        below = other.host.endswith("." + self.host)
        return below or (other.wildcard and other.host == self.host)


# The two files...


def _read_workspace(reader: _Reader, *, env_default: bool) -> SandboxConfig:
    reader.check_keys(_WORKSPACE_KEYS, {})
    enabled = reader.boolean("enabled")
    config = SandboxConfig(
        enabled=env_default if enabled is None else enabled,
        allowed_hosts=reader.hosts("allowedHosts"),
        secrets=_workspace_secrets(reader),
        image_path=_store_name(reader, "imagePath"),
        checkpoint_path=_checkpoint(reader),
        task_may_allow=reader.hosts("taskMayAllow"),
        on_unavailable=_on_unavailable(reader),
        allowed_addresses=reader.texts("allowedAddresses"),
        resolve=reader.text_map("resolve"),
        extra_ca_files=_absolute_paths(reader, "extraCaFiles"),
        hidden_files=reader.texts("hiddenFiles"),
        private_files=reader.texts("privateFiles"),
        passthrough=reader.hosts("passthrough"),
        workspace_mode=_workspace_mode(reader),
    )
    for index, host in enumerate(config.passthrough):
        if not _covered(host, config.allowed_hosts):
            reader.problem(("passthrough", index), _not_allowed(host))
    if config.workspace_mode == "review" and config.on_unavailable == "host":
        reader.problem(
            ("workspaceMode",),
            "work on the host cannot be reviewed before it is done: drop onUnavailable",
        )
    if config.workspace_mode == "review" and config.private_files:
        reader.problem(
            ("privateFiles",),
            "in review nothing of the guest's comes to the host unasked: name them in hiddenFiles",
        )
    for name, secret in config.secrets.items():
        for index, host in enumerate(secret.hosts):
            if not _covered(host, config.allowed_hosts):
                reader.problem(("secrets", name, "hosts", index), _not_allowed(host))
    return config


def _workspace_secrets(reader: _Reader) -> dict[str, SandboxSecret]:
    secrets: dict[str, SandboxSecret] = {}
    for name, entry in reader.children("secrets"):
        entry.check_keys(_SECRET_KEYS, {})
        hosts, variable = entry.hosts("hosts"), entry.text("envVar") or name
        if not _VARIABLE.match(name):
            reader.problem(
                ("secrets", name), "a secret's name has letters, digits and _ (64 at most)"
            )
        if not _VARIABLE.match(variable):
            entry.problem(("envVar",), f"{variable!r} is not the name of an environment variable")
        if not hosts and not entry.has_problem(("hosts",)):
            entry.problem(("hosts",), "the secret may go nowhere: list the hosts it is for")
        secrets[name] = SandboxSecret(
            hosts=hosts,
            env_var=variable,
            headers=entry.texts("headers"),
            places=_places(entry),
            shape=entry.text("shape") or "",
        )
    return secrets


def _places(entry: _Reader) -> tuple[SecretPlace, ...]:
    named = entry.texts("places")
    for index, place in enumerate(named):
        if place not in get_args(SecretPlace):
            known = ", ".join(get_args(SecretPlace))
            entry.problem(("places", index), f"{place!r} is none of {known}")
    return tuple(place for place in get_args(SecretPlace) if place in named)


def _absolute_paths(reader: _Reader, key: str) -> tuple[str, ...]:
    paths = reader.texts(key)
    for index, path in enumerate(paths):
        if not path.startswith("/"):
            reader.problem((key, index), f"{path!r} is not an absolute path")
    return paths


def _on_unavailable(reader: _Reader) -> OnUnavailable:
    word = reader.text("onUnavailable")
    if word not in (None, "refuse", "host"):
        reader.problem(("onUnavailable",), f'{word!r} is neither "refuse" nor "host"')
    return "host" if word == "host" else "refuse"


def _workspace_mode(reader: _Reader) -> WorkspaceMode:
    word = reader.text("workspaceMode")
    if word not in (None, "direct", "review"):
        reader.problem(("workspaceMode",), f'{word!r} is neither "direct" nor "review"')
    return "review" if word == "review" else "direct"


def _apply_task(reader: _Reader, ceiling: SandboxConfig) -> SandboxConfig:
    reader.check_keys(
        _TASK_KEYS,
        dict.fromkeys(_WORKSPACE_KEYS, "only the workspace's sandbox.json may say this"),
    )
    enabled = reader.boolean("enabled")
    if enabled is False and ceiling.enabled:
        reader.problem(("enabled",), "a task cannot switch off the sandbox its workspace demands")
    if ceiling.workspace_mode == "review" and not (ceiling.enabled or enabled):
        reader.problem(
            ("enabled",), "the workspace is for review, which needs a sandbox: set it to true"
        )
    image, checkpoint = _store_name(reader, "imagePath"), _store_name(reader, "checkpointPath")
    if image and not checkpoint and ceiling.checkpoint_path:
        reader.problem(
            ("imagePath",),
            f"the workspace starts from the checkpoint {ceiling.checkpoint_path}, which has an image"
            " of its own: leave it out, or name a checkpointPath",
        )
    return msgspec.structs.replace(
        ceiling,
        enabled=ceiling.enabled or enabled is True,
        allowed_hosts=_task_hosts(reader, ceiling),
        secrets=_task_secrets(reader, ceiling),
        image_path=image or ceiling.image_path,
        checkpoint_path=checkpoint or ceiling.checkpoint_path,
        # Whoever chose what cannot start must not get the host for it.
        on_unavailable="refuse" if image or checkpoint else ceiling.on_unavailable,
    )


def _task_hosts(reader: _Reader, ceiling: SandboxConfig) -> tuple[str, ...]:
    allowed = list(ceiling.allowed_hosts)
    for index, host in reader.listed_hosts("allowedHosts"):
        if not _covered(host, (*ceiling.allowed_hosts, *ceiling.task_may_allow)):
            reader.problem(
                ("allowedHosts", index),
                f"{host} is beyond what the workspace allows: add it to allowedHosts or taskMayAllow"
                " of the workspace's sandbox.json",
            )
        elif host not in allowed:
            allowed.append(host)
    return tuple(allowed)


def _task_secrets(reader: _Reader, ceiling: SandboxConfig) -> dict[str, SandboxSecret]:
    """Every secret of the workspace, narrowed where the task says so; `hosts: []` gives one up."""
    secrets = dict(ceiling.secrets)
    for name, entry in reader.children("secrets"):
        declared = ceiling.secrets.get(name)
        if declared is None:
            reader.problem(
                ("secrets", name), "the workspace's sandbox.json declares no such secret"
            )
            continue
        entry.check_keys(
            ("hosts", "envVar"),
            dict.fromkeys(_SECRET_KEYS, "only the workspace's sandbox.json may say this"),
        )
        if entry.text("envVar") not in (None, declared.env_var):
            entry.problem(("envVar",), "a task cannot choose another variable: leave it out")
        if not entry.has("hosts"):
            continue
        for index, host in entry.listed_hosts("hosts"):
            if not _covered(host, declared.hosts):
                entry.problem(("hosts", index), f"the workspace does not send {name} to {host}")
        narrowed = entry.hosts("hosts", quiet=True)
        secrets[name] = msgspec.structs.replace(declared, hosts=narrowed)
    return {name: secret for name, secret in secrets.items() if secret.hosts}


def _store_name(reader: _Reader, key: str) -> str | None:
    name = reader.text(key)
    if name is not None and not _STORE_NAME.match(name):
        reader.problem(
            (key,), f"{name!r} is not a name of the user's store; a path cannot stand here"
        )
    return name


def _checkpoint(reader: _Reader) -> str | None:
    """A name of the user's store, or a path, which must not depend on where a program was started."""
    text = reader.text("checkpointPath")
    if text is not None and not (text.startswith("/") or _STORE_NAME.match(text)):
        reader.problem(
            ("checkpointPath",),
            f"{text!r} is neither a name of the user's store nor an absolute path",
        )
    return text


def _covered(host: str, patterns: Iterable[str]) -> bool:
    try:
        wanted = HostPattern.parse(host)
        return any(HostPattern.parse(pattern).covers(wanted) for pattern in patterns)
    except ValueError:
        return False  # reported where it was read


def _not_allowed(host: str) -> str:
    return f"a secret's hosts must be allowed hosts: add {host} to allowedHosts"


# Reading values...


class _Reader:
    """Reads typed values of one mapping and collects what is wrong. Absent and null are the same."""

    def __init__(self, source: Source | None, problems: list[Problem]) -> None:
        self._problems = problems
        self._where = source.where if source else lambda key: "nowhere"
        self._prefix = source.prefix if source else ()
        self._values: Mapping[str, object] = {}
        if source is not None and isinstance(source.data, Mapping):
            self._values = source.data
        elif source is not None and source.data is not None:
            self.problem((), "it is not a mapping of keys to values")

    def problem(self, key: KeyPath, text: str) -> None:
        path = (*self._prefix, *key)
        self._problems.append(Problem(self._where(path), _render_key(path), text))

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def has_problem(self, key: KeyPath) -> bool:
        text = _render_key((*self._prefix, *key))
        return any(problem.key.startswith(text) for problem in self._problems)

    def check_keys(self, known: Iterable[str], elsewhere: Mapping[str, str]) -> None:
        for key in self._values:
            if key not in known:
                text = elsewhere.get(key) or f"unknown key; known are {', '.join(known)}"
                self.problem((key,), text)

    def boolean(self, key: str) -> bool | None:
        value = self._values.get(key)
        if value is None or isinstance(value, bool):
            return value
        self.problem((key,), "it is neither true nor false")
        return None

    def text(self, key: str) -> str | None:
        value = self._values.get(key)
        if value is None or (isinstance(value, str) and value):
            return value
        self.problem((key,), "it is not a text")
        return None

    def texts(self, key: str, *, quiet: bool = False) -> tuple[str, ...]:
        return tuple(text for _, text in self._listed(key, quiet=quiet))

    def hosts(self, key: str, *, quiet: bool = False) -> tuple[str, ...]:
        return tuple(host for _, host in self.listed_hosts(key, quiet=quiet))

    def listed_hosts(self, key: str, *, quiet: bool = False) -> list[tuple[int, str]]:
        """Return the readable hosts of a list with their indexes; report the others unless `quiet`."""
        good = []
        for index, text in self._listed(key, quiet=quiet):
            try:
                HostPattern.parse(text)
            except ValueError as error:
                if not quiet:
                    self.problem((key, index), f"{text!r} is no host pattern: {error}")
            else:
                good.append((index, text.lower().rstrip(".")))
        return good

    def text_map(self, key: str) -> dict[str, str]:
        value = self._values.get(key)
        if value is None:
            return {}
        if isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values()):
            return dict(value)
        self.problem((key,), "it is not a mapping of texts to texts")
        return {}

    def children(self, key: str) -> list[tuple[str, _Reader]]:
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.problem((key,), "it is not a mapping of names to settings")
        entries = value.items() if isinstance(value, Mapping) else ()
        return [(name, self._child((key, name), entry)) for name, entry in entries]

    def _child(self, key: KeyPath, data: object) -> _Reader:
        source = Source({} if data is None else data, self._where, (*self._prefix, *key))
        return _Reader(source, self._problems)

    def _listed(self, key: str, *, quiet: bool) -> list[tuple[int, str]]:
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            if not quiet:
                self.problem((key,), "it is not a list")
            return []
        bad = [index for index, item in enumerate(value) if not isinstance(item, str) or not item]
        if not quiet:
            for index in bad:
                self.problem((key, index), "it is not a text")
        return [(index, item) for index, item in enumerate(value) if index not in bad]


def _render_key(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
