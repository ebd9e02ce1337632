"""`python -m tropd` is `tropd`."""

from __future__ import annotations

import sys

from tropd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
