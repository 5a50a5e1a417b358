"""What is told while something takes long."""


def ignore_progress(line: str) -> None:
    """For progress that nobody wants to hear."""
