"""Looks for the secrets of a lab where none may be: python -m tests.leaks --lab NAME [LOG...]

On its hosts (files, process environments, argument lists, journals), in what playbooks left on this machine, and in the files named
as LOG. Exit status 1 if one is found.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.leaks.finder import PROJECT, leaks, secrets_of


def main() -> int:
    """Search, and print each place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lab", required=True)
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG")
    arguments = parser.parse_args()
    lab = PROJECT / ".lab" / arguments.lab
    secrets = secrets_of(lab)
    found = leaks(lab, secrets, arguments.logs)
    print("\n".join(found) or f"none of {len(secrets)} secrets was found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
