"""Runs the command line as `python -m feinwerk.cli`."""

import sys

from feinwerk.cli import main

sys.exit(main())
