"""Breaks the package on purpose, one fault at a time, and shows which tests notice.

    python tests/mutations.py [--only NAME] [--list]

The faults are in faults.py. The exit status is 1 if any fault goes unnoticed, and 2 if the tests
are red without any fault. pytest does not collect this file.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent


def run(tests, fault=""):
    """Whether the tests are green with this fault; stops at the first red one."""
    environment = {**os.environ, "GRADES_FAULT": fault, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-p", "faults", "-x", "-q", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run {tests}:\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="faults whose name contains NAME")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    chosen = [f for f in FAULTS.values() if (arguments.only or "") in f.name]
    if not chosen:
        parser.error(f"--only {arguments.only!r} fits none of: {', '.join(FAULTS)}")
    if arguments.list:
        print("\n".join(f.name for f in chosen))
        return 0

    for test in sorted({test for f in chosen for test in f.tests}):
        if not run([test]):
            print(f"{test} is red without any fault: nothing can be learned")
            return 2
    unnoticed = []
    print(f"{'fault':58} {'seconds':>7}  noticed by")
    for f in chosen:
        start = time.perf_counter()
        red = [Path(test).stem for test in f.tests if not run([test], f.name)]
        unnoticed += [] if red else [f.name]
        found = ", ".join(red) or "NOTHING"
        print(f"{f.name:58} {time.perf_counter() - start:7.0f}  {found}", flush=True)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} faults are noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
