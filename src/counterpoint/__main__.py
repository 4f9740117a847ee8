"""Run the command line as `python -m counterpoint`; torchrun starts this module."""

import sys

from counterpoint.cli import main

sys.exit(main())
