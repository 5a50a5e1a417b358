"""Saved sandboxes and copies of running ones."""
