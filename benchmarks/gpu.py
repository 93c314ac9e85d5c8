"""All that a GPU is needed for, in two commands of at most eight minutes each.

    python -m benchmarks.gpu tests
    python -m benchmarks.gpu benchmarks

They need Python, torch, Triton and pytest, and nothing else: no make, no network, no installation.
pytest-xdist makes the tests quicker, since most of the time goes into compiling kernels. A failure
or a hang does not keep the rest from running, and rows are written as they are measured.

GRADES_RESULTS names the folder of the results in place of benchmarks/results, GRADES_COMMIT the
commit that they are of, where the sources lie outside of a repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKERS = 8
TEST_SECONDS = 460
SECONDS_TO_END = 10
BENCHMARKS = {  # with the seconds that each may take
    ("benchmarks.bench_step",): 100,
    ("benchmarks.bench_kernels",): 260,
    ("benchmarks.bench_kernels", "--part", "tuning"): 100,
}


def run(module: tuple[str, ...], seconds: int) -> bool:
    """Run `python -m module`, interrupted after `seconds`; whether it succeeded in time."""
    print(f"gpu: {' '.join(module)}, at most {seconds} s", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen([sys.executable, "-m", *module], cwd=ROOT, env=environment)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        print(f"gpu: {module[0]} is interrupted after {seconds} s", flush=True)
        process.send_signal(signal.SIGINT)  # pytest then prints its results so far
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
    return False


def test_files() -> list[str]:
    """The files with tests for a GPU, the longest first; others may need more packages."""
    files = [x for x in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in x.read_text()]
    return [str(x.relative_to(ROOT)) for x in sorted(files, reverse=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="+", choices=("tests", "benchmarks"))
    results = []
    for what in parser.parse_args().what:
        if what == "tests":
            parallel = ("-n", str(WORKERS)) if importlib.util.find_spec("xdist") else ()
            pytest = ("pytest", "-m", "gpu", "-q", "--durations=15", *parallel, *test_files())
            results.append(run(pytest, TEST_SECONDS))
        else:
            results += [run(module, seconds) for module, seconds in BENCHMARKS.items()]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
