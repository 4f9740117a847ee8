"""`python -m counterpoint`, and what torchrun starts."""

import sys

from counterpoint.cli import main

sys.exit(main())
