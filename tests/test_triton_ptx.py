"""The compiled kernels, run from their PTX by an emulator (ptx.py), beside Triton's interpreter.

Contract: the tests of the kernels pass on the code that is compiled for a GPU as they do in the
interpreter; parameters, moments and decisions have the same bits in both. Every kind of fault that
the emulator looks for is put into a copy of the kernels and must be found.

Triton cannot compile in a process in which it has interpreted, so the emulator runs in others.
"""

import math
import os
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from harness import HYPER, ROOT, noise, run_python
from triton_runs import module, start, use_edited_modules, usual

from grades_kernels.freezing.config import TIMINGS

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels run on the device itself", allow_module_level=True)

SHAPES = ((3, 5), (65, 150), (7,))  # several programs, and lengths that are no multiple of a block
TESTS = {
    "sm_90": ("kernels", "scaling", "ptx"),
    "sm_80": ("ptx",),
    "sm_100": ("ptx",),
}
EMULATES = "ptx" in sys.modules  # as a plugin
run_compiled = partial(run_python, cwd=ROOT, TRITON_INTERPRET=None)


@pytest.mark.slow
@pytest.mark.skipif(EMULATES, reason="it runs already")
@pytest.mark.parametrize("target", TESTS)
def test_the_kernels_tests_pass_on_compiled_code(target):
    files = [ROOT / "tests" / f"test_triton_{name}.py" for name in TESTS[target]]
    done = run_compiled("-m", "pytest", "-q", "-p", "ptx", *files, PTX_TARGET=target)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    launches = re.search(r"(\d+) launches of PTX", done.stdout)
    assert launches and int(launches[1]) > 50


def several_steps(dtype=torch.float32, **options):
    """Steps before and at checks, one unit freezing, on tensors one behind the other in memory."""
    sizes = [math.prod(shape) for shape in SHAPES]
    flat = torch.linspace(-1, 1, sum(sizes)).to(dtype).split(sizes)
    params = [torch.nn.Parameter(x.view(shape)) for x, shape in zip(flat, SHAPES, strict=True)]
    assert params[1].data_ptr() % 16 != 0
    run = start(True, params=params, patience=2, **options)
    for _ in range(4):
        run.step(*usual(run))
    return run


CASES = [("float32", "next_step"), ("float16", "same_step")]


@pytest.mark.skipif(EMULATES, reason="it needs the interpreter")
def test_the_bits_are_those_of_the_interpreter(tmp_path):
    done = run_compiled(__file__, tmp_path / "emulated.pt")
    assert done.returncode == 0, done.stderr
    emulated = torch.load(tmp_path / "emulated.pt")
    interpreted = runs_of_all_cases()
    assert [events for events, _ in interpreted] == [events for events, _ in emulated]
    for (_, ours), (_, theirs) in zip(interpreted, emulated, strict=True):
        assert ours.keys() == theirs.keys()
        for name, x in ours.items():
            assert torch.equal(x, theirs[name]), name


def runs_of_all_cases():
    found = []
    for dtype, timing in CASES:
        options = {"dtype": getattr(torch, dtype), "freeze_timing": timing, "amsgrad": True}
        run = several_steps(tau=400.0, **options)
        assert run.events and len(run.events) < len(run.opt.monitored_units)
        found.append((run.events, run.tensors()))
    return found


FAULTS = {
    "a tensor is taken for aligned": ("& 15) == 0", "& 1) == 0", "not aligned"),
    "whole blocks are read at the end": ("mask=mask, other=0.0)", "mask=None)", "outside"),
    "whole blocks are written at the end": ("element_ty), mask=mask)", "element_ty))", "outside"),
    "a program goes on into the next one": (" - origin, span)", " - origin, 2 * span)", "write"),
    "all programs of a tensor count its step": ("if index == 0:", "if index >= 0:", "the same"),
    "a root is taken approximately": ("tl.sqrt_rn(v)", "tl.sqrt(v)", "does not round"),
    "all programs store one sum": (".first_program) + index)", ".first_program))", "the same"),
}


runs_within = pytest.mark.skipif(not EMULATES, reason="runs in the test above")


@runs_within
def test_aligned_tensors_are_read_and_written_once_in_whole_sectors(monkeypatch):
    """The bytes are those that the predictions for a GPU count (benchmarks/README.md)."""
    import ptx

    launches = []
    monkeypatch.setattr(ptx, "check_races", launches.append)
    run = start(True, ((256, 256),), tau=0.0, freeze_timing="next_step")
    for _ in range(4):
        run.step(*usual(run))
    first, check = launches[0], launches[-2]  # the last one decides
    for accesses, loads, stores in ((first, 4, 3), (check, 5, 4)):
        wide = [access for access in accesses if access[1] == 16]
        for is_store, n_tensors in ((False, loads), (True, stores)):
            n_bytes = sum(16 * len(at) for stored, _, at, _ in wide if stored == is_store)
            assert n_bytes == n_tensors * 4 * 256 * 256
        for _, _, at, _ in wide:
            of_warp = np.sort(at.reshape(-1, 32) // 32)
            assert (of_warp[:, ::2] == of_warp[:, 1::2]).all()  # two threads in each
            assert (np.diff(of_warp[:, ::2]) == 1).all()


@runs_within
@pytest.mark.parametrize("timing", TIMINGS)
def test_triton_compiles_in_the_first_step_of_an_engine_alone(timing):
    """Triton's own cache has all that later steps launch, whatever they pass."""
    run = start(True, SHAPES, tau=2000.0, freeze_timing=timing, stop_grad=False, cooldown=2)
    run.steps(1)
    kernels = [getattr(module("triton_engine"), name) for name in ("step_kernel", "decide_kernel")]
    n_compiled = [len(kernel.codes) for kernel in kernels]
    for lr in (0.02, 0.01, 0.0):
        run.opt.param_groups[0]["lr"] = lr
        run.steps(4)
    assert run.opt.all_frozen
    assert [len(kernel.codes) for kernel in kernels] == n_compiled


@runs_within
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_as_by_the_fused_adamw_of_torch(dtype):
    """The interpreter truncates bf16. Both compute in fp32, in another order of operations."""
    ours = start(True, ((64, 64),), dtype=dtype, tau=None, lr=1e-3)
    theirs = torch.nn.Parameter(ours.params[0].detach().clone())
    adamw = torch.optim.AdamW([theirs], **{**HYPER, "lr": 1e-3}, fused=True)
    for seed in range(20):
        [theirs.grad] = grads = noise([theirs], seed)
        ours.step(*(g.clone() for g in grads))
        adamw.step()
    for name, x in ours.tensors().items():
        other = theirs if name == "parameter 0" else adamw.state[theirs][name.split()[0]]
        assert (x != other).sum() <= x.numel() // 500, name


@runs_within
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(monkeypatch, tmp_path, name):
    import ptx

    old, new, message = FAULTS[name]
    monkeypatch.delenv("TRITON_INTERPRET")  # read where the kernels are imported
    use_edited_modules(monkeypatch, tmp_path, {"triton_kernels": (old, new)})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ptx.install(module("triton_engine"), os.environ["PTX_TARGET"], monkeypatch.setattr)
    with pytest.raises(ptx.Fault, match=message):
        several_steps()


DIVERGENT = """.visible .entry kernel() {
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 64;
    @%p1 bra $L;
    bar.sync 0;
$L:
    ret;
}"""


@runs_within
def test_a_barrier_that_half_of_the_threads_reach_is_found():
    import ptx

    nothing = np.zeros(0, np.int64)
    threads = ptx.Threads(ptx.Code(DIVERGENT, 0), np.arange(1), 1, {}, nothing, nothing, [])
    with pytest.raises(ptx.Fault, match="not reached by all threads"):
        threads.run()


@runs_within
def test_reading_what_another_program_writes_is_found():
    import ptx

    at, programs = np.array([4096]), [np.array([k]) for k in range(2)]
    ptx.check_races([(True, 4, at, programs[0]), (False, 4, at, programs[0])])
    with pytest.raises(ptx.Fault, match="reads bytes that another one writes"):
        ptx.check_races([(True, 4, at, programs[0]), (False, 4, at, programs[1])])


if __name__ == "__main__":
    import ptx

    ptx.install(module("triton_engine"), "sm_90")
    os.environ["TRITON_INTERPRET"] = "1"  # CPU tensors are served
    torch.save(runs_of_all_cases(), sys.argv[1])
