"""`python -m graft`, and what the command `graft` calls."""

import sys

from graft.engine.runtime import start_anew


def start() -> None:
    """Run a command in a process of its own."""
    start_anew(sys.argv[1:])
    from graft.cli import main

    main()


if __name__ == "__main__":
    start()
