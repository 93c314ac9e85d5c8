"""`python -m grades_kernels` runs the command `grades-kernels`."""

import sys

from .cli import main

sys.exit(main())
