"""For `python -m taskvm.cli`."""

from taskvm.cli import main

main()
