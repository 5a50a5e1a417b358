"""What helps to test code that builds on taskvm. Imports no test runner."""

from taskvm.fs.conformance import ProviderConformance

__all__ = ["ProviderConformance"]
