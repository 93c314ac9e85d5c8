"""`python -m grades_kernels` is the command `grades-kernels`."""

import sys

from .cli import main

sys.exit(main())
