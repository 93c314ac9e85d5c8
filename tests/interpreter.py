"""Triton's interpreter in less time: work that it repeats at every call is done once.

At every launch, and whenever a kernel calls a function, the interpreter replaces the functions of
Triton's language by its own (`_patch_lang` in Triton 3.6 to 3.9), and at the end of the launch it
puts them back. Here they stay replaced, since a process that interprets compiles nothing. And it
makes a table of dtypes anew for every array.
"""

from types import SimpleNamespace

from triton.runtime import interpreter

STAYS = SimpleNamespace(restore=lambda: None)


def patching_once(patch_language):
    """`patch_language`, but once for each module and for ever."""
    patched = {}

    def patch(function):
        module = function.__globals__
        if id(module) not in patched:
            patch_language(function)
            patched[id(module)] = module  # alive, so that no other one gets its id
        return STAYS

    return patch


def cached_by_name(dtype_of):
    """`dtype_of` of scalar dtypes and of blocks of them."""
    found = {}

    def cached(kind):
        kind = kind.scalar
        if kind.name not in found:
            found[kind.name] = dtype_of(kind)
        return found[kind.name]

    return cached


def speed_up():
    for name, change in (("_patch_lang", patching_once), ("_get_np_dtype", cached_by_name)):
        if hasattr(interpreter, name):
            setattr(interpreter, name, change(getattr(interpreter, name)))
