"""Process groups on this machine: pools that many tests share, and scripts that run on two ranks.

A pool uses gloo over loopback with a file store, so it needs no port. Its processes are killed when
the pool is closed, when a rank fails or exceeds the time limit, and when the parent process ends.
"""

import atexit
import concurrent.futures
import functools
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from harness import run_python

CASE_LIMIT = timedelta(seconds=60)
CONTEXT = multiprocessing.get_context("forkserver")
# The server imports once, in place of every process; the first step imports _dynamo.
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "harness", "conftest", __name__]
CONTEXT.set_forkserver_preload(PRELOADED)
_POOLS = {}


class RankError(AssertionError):
    """A rank failed; the message contains the traceback or the result of every rank."""


class Pool:
    """A process group of `size` ranks that run functions of test modules."""

    def __init__(self, size):
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(theirs, rank, size, self.folder.name), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args):
        """Run `function(*args)` on every rank and return the results by rank."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for pipe in self.pipes:
            try:
                late = not pipe.poll(CASE_LIMIT.total_seconds())
                answers.append((False, "no answer in time") if late else pipe.recv())
            except EOFError:
                answers.append((False, "the process has ended"))
            if not answers[-1][0]:
                break
        if not all(ok for ok, _ in answers):
            self.close()  # the other ranks may be blocked in a collective
            raise RankError("\n".join(f"rank {r}: {text}" for r, (_, text) in enumerate(answers)))
        return [answer for _, answer in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()
        _POOLS.pop(len(self.processes), None)


def run(size, function, *args):
    """Run `function(*args)` on every rank of a shared pool and return the results by rank."""
    if size not in _POOLS:
        _POOLS[size] = Pool(size)
    return _POOLS[size].run(function, *args)


def on_ranks(size, expected=None):
    """Makes a test of a function that every rank of a pool calls, with its results by rank.

    Args:
        expected: The results; by default None on every rank, of a function that asserts by itself.
    """

    def decorate(function):
        @functools.wraps(function)
        def test(**arguments):
            results = run(size, _undecorated, function.__module__, function.__name__, arguments)
            if results != (expected or [None] * size):
                raise RankError(f"the results by rank are {results} instead of {expected}")

        return test

    return decorate


def gathered(value):
    """The values that all ranks pass, by rank; called on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _undecorated(module, name, arguments):
    return getattr(importlib.import_module(module), name).__wrapped__(**arguments)


def run_in_new_process(function, *args):
    """The result of `function(*args)`, a function of a test module, in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(function, *args).result(timeout=300)


def end_script():
    """End a script of `run_script` that a launcher waits for.

    One in ten such jobs aborts while the interpreter ends, with torch's AdamW too ("terminate
    called without an active exception").
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def run_script(file, folder, *launcher):
    """Run `file` as a script with the argument `folder`, in which it writes "rank{k}.json".

    Args:
        launcher: Options of the interpreter before the script, e.g. of torch.distributed.run.

    Returns:
        The contents of "rank0.json" and "rank1.json".
    """
    done = run_python(*launcher, file, folder, GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@atexit.register
def close_all():
    for pool in list(_POOLS.values()):
        pool.close()


def _serve(pipe, rank, size, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if os.environ.get("GRADES_FAULT"):
        import faults

        faults.apply_from_environment()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), size),
        rank=rank,
        world_size=size,
        timeout=CASE_LIMIT / 3,
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
