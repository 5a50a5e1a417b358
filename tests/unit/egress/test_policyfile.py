"""The file form of a policy (taskvm.egress.policyfile): every mistake is told with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvm.egress.policy import Policy
from taskvm.errors import UsageError

TOML = """# a comment
allow = [
    "a.test",
    "b.test",
]

[[rules]]
name = "one"
action = "allow"
hosts = ["c.test"]

[[rules]]
action = "deny"
hosts = ["d.test", "e.test"]
methods = ["GET"]
paths = [
    "/x/**",
    "/y",
]
"""
JSON = """{
  "allow": ["a.test",
            "b.test"],
  "rules": [
    {"name": "one", "action": "allow", "hosts": ["c.test"]},
    {"action": "deny",
     "hosts": ["d.test", "e.test"],
     "methods": ["GET"],
     "paths": ["/x/**",
               "/y"]}
  ]
}
"""
MISTAKES = [
    ('"b.test"', '"*"', 4, 3), ('"e.test"', '"x y"', 14, 7), ('"/y"', '"y"', 18, 10),
    ('"GET"', '"get"', 15, 8), ('"GET"', "5", 15, 8), ('"c.test"', "", 10, 5),
    ("deny", "dent", 13, 6), ("one", "one\\u0007", 8, 5),
]  # fmt: skip


def test_both_forms_mean_the_same() -> None:
    assert Policy.from_text(TOML) == Policy.from_text(JSON)
    assert [rule.name for rule in Policy.from_text(TOML).rules] == [
        "one",
        "rule 2",
        "a.test",
        "b.test",
    ]


@pytest.mark.parametrize(("right", "wrong", "toml_line", "json_line"), MISTAKES)
def test_a_mistake_is_told_with_its_line(
    right: str, wrong: str, toml_line: int, json_line: int
) -> None:
    for text, line in ((TOML, toml_line), (JSON, json_line)):
        with pytest.raises(UsageError) as caught:
            Policy.from_text(text.replace(right, wrong), "my.policy")

        assert f"my.policy, line {line}:" in str(caught.value)


def test_an_unknown_key_is_a_mistake(tmp_path: Path) -> None:
    for text in ('alow = ["a.test"]', '{"alow": ["a.test"]}', "[[rules]]\nallow = true"):
        (tmp_path / "p").write_text(text)
        with pytest.raises(UsageError, match=r"/p, line [12]: .*(alow|allow|action)"):
            Policy.from_file(tmp_path / "p")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[rules]]\naction = "allow"\nhost = ["a.test"]', "3: there is no key 'host'. The keys of a rule are name,"),
        ('{"allow": [],\n"alow": []}', "2: there is no key 'alow'. The keys of a policy are rules, allow"),
        ('[[rules]]\naction = "deny"', "1: a rule needs the key 'hosts'"),
        ('[[rules]]\naction = "dent"', "2: action: 'dent' is not known. Write \"allow\" or \"deny\""),
        ('allow = "a.test"', "1: allow: Expected"),
        ("allow = []\nx = \n", "2: it is no TOML: Invalid value"),
        ("allow = []\n\nx = [\n", "3: it is no TOML: Invalid value"),
    ],
)  # fmt: skip
def test_a_mistake_says_what_is_right(text: str, said: str) -> None:
    """In the words of the file, with the line of the key itself, also where the text is torn."""
    with pytest.raises(UsageError) as caught:
        Policy.from_text(text, "my.policy")

    assert f"my.policy, line {said}" in str(caught.value)


@pytest.mark.parametrize("data", [b"allow = [", b"{\n!", b"\xff", b"[" * 100_000, b"{" * 9, b"[]"])
def test_what_is_no_policy_names_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.toml").write_bytes(data)

    with pytest.raises(UsageError, match=r"read the policy file .*/p\.toml"):
        Policy.from_file(tmp_path / "p.toml")


def test_a_file_that_is_missing_or_endless_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, Path("/dev/zero")):
        with pytest.raises(UsageError, match="read the policy file"):
            Policy.from_file(path)


@given(st.text(max_size=80) | st.text('{}[]":,=\n alowrues01', max_size=60))
def test_any_text_is_a_policy_or_a_usage_error(text: str) -> None:
    try:
        policy = Policy.from_text(text)
    except UsageError:
        return

    assert Policy.from_text(policy.to_toml()) == policy
