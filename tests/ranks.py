"""Processes of a job on this machine, started once and used for many cases.

A pool talks gloo over loopback and meets in a file, so it needs no port. Whatever a rank does, its
processes end: with the pool, with a case that takes too long, and with the process that made them.
"""

import atexit
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

CASE_LIMIT = timedelta(seconds=60)
_POOLS = {}


class RankError(AssertionError):
    """A rank failed; holds what each of them said."""


class Pool:
    """`size` ranks that run functions of test modules."""

    def __init__(self, size):
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.fsdp", __name__])
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, self.folder.name), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args):
        """What `function(*args)` returns on every rank, by rank."""
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
            self.close()  # the other ranks may wait for the one that failed
            raise RankError("\n".join(f"rank {r}: {said}" for r, (_, said) in enumerate(answers)))
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
    """`function(*args)` on every rank of a job of `size` processes; the results by rank."""
    if size not in _POOLS:
        _POOLS[size] = Pool(size)
    return _POOLS[size].run(function, *args)


@atexit.register
def close_all():
    for pool in list(_POOLS.values()):
        pool.close()


def _serve(pipe, rank, size, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
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
