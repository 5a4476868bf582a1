"""``kvpsi`` and ``python -m kvpsi`` begin here."""

import sys


def run() -> int:
    """Run the command; Ctrl-C while the modules are still being loaded shows no traceback either."""
    try:
        from kvpsi.cli.main import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
