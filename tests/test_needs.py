"""needs.py: one sentence for what does not hold, and for a package that is not there."""
import sys

import pytest

import needs


def test_what_does_not_hold_is_a_sentence():
    assert needs.check([1], "there must be one") is None
    with pytest.raises(ValueError, match=r"^there must be one$"):
        needs.check([], "there must be one")


def test_a_missing_package_is_named_whatever_needs_it(monkeypatch):
    assert needs.library("json", "python") is sys.modules["json"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^this needs matplotlib: pip install matplotlib$"):
        needs.library("matplotlib", "matplotlib")
