"""A secret as a text of the command line: NAME@HOST[,HOST…][,in=PLACE][,header=NAME][,shape=SHAPE],
and for a command [,refresh=SECONDS].

Rule: a text with a `=` that is not one of these may be a value that the user wrote there. It is refused and not
repeated: every user of this host reads the arguments of every process.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import taskvm
from taskvm import UsageError

FORM = "HOST[,HOST…][,in=PLACE][,header=NAME][,shape=SHAPE]"
_MORE = "What may follow the hosts is in=query, in=path, in=body, header=NAME and shape=SHAPE"


def read_secret(text: str, variables: Mapping[str, str] | None = None) -> taskvm.Secret:
    """Return the secret of --secret NAME@…, its value from `variables` or else this process's environment."""
    name, separator, rest = text.partition("@")
    if "=" in name:
        raise _value_given("--secret")
    hosts, more = _read("--secret", rest)
    if not separator or not name:
        raise UsageError(f"read --secret {text}", f"it is not NAME@{FORM}")
    if variables is not None:
        return taskvm.Secret.from_value(name, variables.get(name, ""), hosts=hosts, **more)
    return taskvm.Secret.from_env(name, hosts=hosts, **more)


def read_secret_file(text: str, variables: Mapping[str, str] | None = None) -> taskvm.Secret:
    """Return the secret of --secret-file NAME=FILE@…."""
    name, path, rest = _split("--secret-file", text, "FILE")
    hosts, more = _read("--secret-file", rest)
    if variables is not None:
        return taskvm.Secret.from_value(name, variables.get(name, ""), hosts=hosts, **more)
    return taskvm.Secret.from_file(path, name=name, hosts=hosts, **more)


def read_secret_command(text: str, variables: Mapping[str, str] | None = None) -> taskvm.Secret:
    """Return the secret of --secret-command NAME=COMMAND@…; with refresh=SECONDS it is run again when it is too old."""
    name, command, rest = _split("--secret-command", text, "COMMAND")
    rest, refresh_s = _take_refresh(rest)
    hosts, more = _read("--secret-command", rest)
    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise UsageError("read --secret-command", f"its COMMAND has {str(error).lower()}") from None
    if variables is not None:
        if refresh_s is not None:
            raise UsageError(
                f"read --secret-command {text}",
                "the supervisor runs no programs: what it holds has the value of its start",
                f"Leave out refresh, and renew it with `taskvm secret put SANDBOX {name}@HOST`",
            )
        return taskvm.Secret.from_value(name, variables.get(name, ""), hosts=hosts, **more)
    return taskvm.Secret.from_callback(
        name, taskvm.command_output(argv), hosts=hosts, refresh_s=refresh_s, **more
    )


def _take_refresh(text: str) -> tuple[str, float | None]:
    """Return what follows the @ without refresh=SECONDS, and the seconds."""
    parts = text.split(",")
    said = [part for part in parts if part.startswith("refresh=")]
    if not said:
        return text, None
    number = said[-1].removeprefix("refresh=")
    if len(said) > 1 or not number.isdecimal() or not int(number):
        raise UsageError("read --secret-command", "refresh= is one whole number of seconds")
    return ",".join(part for part in parts if part not in said), float(number)


def _split(option: str, text: str, source: str) -> tuple[str, str, str]:
    name, equals, rest = text.partition("=")
    content, separator, places = rest.rpartition("@")
    if not (name and equals and content.strip() and separator):
        raise UsageError(f"read {option} {text}", f"it is not NAME={source}@{FORM}")
    return name, content, places


def _read(option: str, text: str) -> tuple[list[str], taskvm.SecretArguments]:
    """Return the hosts, and what else is said about them."""
    hosts: list[str] = []
    said: dict[str, list[str]] = {"in": [], "header": [], "shape": []}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            hosts.append(part)
        elif key in said and value:
            said[key].append(value)
        else:
            raise _value_given(option)
    if len(said["shape"]) > 1:
        raise UsageError(f"read {option}", "a secret has one shape")
    more: taskvm.SecretArguments = {
        "places": said["in"],  # type: ignore[typeddict-item]  # a taskvm.Secret checks them
        "shape": "".join(said["shape"]),
    }
    if said["header"]:
        more["headers"] = said["header"]
    return hosts, more


def _value_given(option: str) -> UsageError:
    return UsageError(
        f"read {option}",
        "a value does not belong on the command line, where every user of this host can read it",
        f"Put it into the environment and write --secret NAME@HOST. {_MORE}",
    )
