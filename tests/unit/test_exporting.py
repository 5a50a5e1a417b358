"""taskvm.exporting: a package whose names are imported when they are asked for."""

import sys
from types import ModuleType

import pytest

from taskvm.exporting import exporter


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("lazy_package")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    getting, listing = exporter(made.__name__, {"wave": "open Error", "colorsys": "rgb_to_hls"})
    vars(made).update(__getattr__=getting, __dir__=listing)
    for module in ("wave", "colorsys"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return made


def test_a_module_is_imported_for_the_first_of_its_names_and_no_other_is(
    package: ModuleType,
) -> None:
    found = package.Error

    assert found is sys.modules["wave"].Error
    assert "colorsys" not in sys.modules
    assert vars(package)["Error"] is found, "kept: not looked up again"


def test_every_name_is_listed_before_it_is_asked_for(package: ModuleType) -> None:
    assert {"open", "Error", "rgb_to_hls", "__name__"} <= set(dir(package))
    assert "wave" not in sys.modules


def test_a_name_that_is_not_there_is_an_attribute_error(package: ModuleType) -> None:
    """As for any module, so that `hasattr` and imports of submodules work."""
    with pytest.raises(AttributeError, match="module 'lazy_package' has no attribute 'close'"):
        package.close  # noqa: B018
