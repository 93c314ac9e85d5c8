"""A forked process can go on stepping: it never waits for the threads of its parent.

The tests share one run of this file as a script with two threads. It steps small and large tensors,
then does the same in children of every kind, and prints the outcome of each.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from harness import run_python
from torch.utils.data import DataLoader, Dataset

from grades_kernels import GradESAdamW, grades_adamw
from grades_kernels.backends import host_step, native

pytestmark = [
    pytest.mark.skipif(native.why_not_loaded() is not None, reason="the native op is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc"),
]

SMALL, LARGE = 8, 1_000_000
LIMIT = 20  # seconds until a child that does not end is taken for one that never will
OPTIONS = {"beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.0, "eps": 1e-8}


def ones(n):
    """Made by NumPy: torch itself would start threads, or wait for them in a child."""
    return torch.from_numpy(np.ones((2, n // 2), dtype=np.float32))


def optimizer_of(n, fused=True):
    p = torch.nn.Parameter(ones(n))
    p.grad = ones(n)
    return GradESAdamW([p], fused=fused, tau=0.0, grace_steps=1)


def functional(n):
    columns = [[ones(n)] for _ in range(4)] + [[], [torch.zeros(())]]
    return lambda: grades_adamw(*columns, fused=True, **OPTIONS, amsgrad=False, maximize=False)


def in_child(step, limit=LIMIT):
    """ "done" where a forked child takes the step, "waits" where it had to be killed."""
    child = os.fork()
    if child == 0:
        step()
        os._exit(0)
    for _ in range(limit * 100):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "done" if status == 0 else f"status {status}"
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "waits"


def step_anew():
    """The first steps of optimizers that the child makes itself."""
    for n in (SMALL, LARGE):
        optimizer_of(n).step()


def started(method):
    process = mp.get_context(method).Process(target=step_anew)
    process.start()
    process.join(5 * LIMIT)  # a spawned one first imports torch, slowly on a busy machine
    late = process.is_alive()
    process.kill()
    process.join()
    return "waits" if late else "done" if process.exitcode == 0 else f"code {process.exitcode}"


class Steps(Dataset):
    """Trains something on its own to make an item, as a dataset of adversarial examples does."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        step_anew()
        return index


def loaded():
    items = list(DataLoader(Steps(), num_workers=1, timeout=LIMIT, multiprocessing_context="fork"))
    return "done" if len(items) == 2 else f"{len(items)} items"


def unguarded(step):
    """The step of a child that takes itself for the process of the import."""
    host_step._PROCESS = os.getpid()
    step()


def n_started(step):
    """The threads that a step starts."""
    before = len(os.listdir("/proc/self/task"))
    step()
    return len(os.listdir("/proc/self/task")) - before


def outcomes():
    torch.set_num_threads(2)
    by_size = {n: optimizer_of(n) for n in (SMALL, LARGE)}
    found = {f"threads of {n} elements": n_started(opt.step) for n, opt in by_size.items()}
    large = by_size[LARGE]
    for n, optimizer in by_size.items():
        found[f"fork, {n} elements"] = in_child(optimizer.step)
    found["fork, reference"] = in_child(optimizer_of(LARGE, fused=False).step)
    found["fork, functional"] = in_child(functional(LARGE))
    found["fork, state made in the child"] = in_child(step_anew)

    def nested():
        assert in_child(large.step) == "done"

    found["fork of a fork"] = in_child(nested)
    for method in ("fork", "spawn", "forkserver"):
        found[method] = started(method)
    found["DataLoader"] = loaded()

    def count():
        large.step()
        assert torch.get_num_threads() == 2

    found["the number of threads is left as it was"] = in_child(count)
    found["without the guard"] = in_child(lambda: unguarded(large.step), limit=3)
    found["without the guard, small"] = in_child(lambda: unguarded(by_size[SMALL].step))
    return found


CHILDREN = [
    f"fork, {SMALL} elements",
    f"fork, {LARGE} elements",
    "fork, reference",
    "fork, functional",
    "fork, state made in the child",
    "fork of a fork",
    "fork",
    "spawn",
    "forkserver",
    "DataLoader",
    "the number of threads is left as it was",
    "without the guard, small",
]


@functools.cache
def found():
    # Triton's interpreter is no native op.
    done = run_python(__file__, OMP_NUM_THREADS="2", TRITON_INTERPRET=None)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_steps_after_its_parent_has_stepped(name):
    assert found()[name] == "done"


def test_small_work_starts_no_thread():
    """Two threads are allowed, and large tensors use both."""
    assert found()[f"threads of {SMALL} elements"] == 0
    assert found()[f"threads of {LARGE} elements"] >= 1


def test_without_the_guard_a_child_waits_for_ever():
    """Negative control: GCC's OpenMP waits for threads that only the parent has."""
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("torch was built with another OpenMP")
    assert found()["without the guard"] == "waits"


if __name__ == "__main__":
    print(json.dumps(outcomes()))
