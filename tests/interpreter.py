"""Triton's interpreter in half the time: what it repeats at every call is done once.

While a kernel runs, the interpreter replaces the builtin functions of Triton's language by its own.
It looks for them among all names and replaces them again whenever a kernel calls a function.
Triton 3.6 to 3.9 do so by the functions that `speed_up` wraps.
"""

import functools
import inspect

from triton.runtime import interpreter


@functools.cache
def builtins_of(namespace):
    """First called before anything is replaced: a replaced builtin is none any more."""
    members = inspect.getmembers(namespace)
    return [name for name, member in members if interpreter.tl.core.is_builtin(member)]


def patch_builtins(namespace, builder, scope):
    for name in builtins_of(namespace):
        member = getattr(namespace, name)
        if interpreter.tl.core.is_builtin(member):
            interpreter._patch_attr(namespace, name, member, builder, scope)


def patching_once(patch_language):
    """`patch_language`, but once for each module in a launch, which ends with `restore`."""
    patched = set()

    def patch(function):
        module = id(function.__globals__)
        if module in patched:
            return None
        scope, is_first = patch_language(function), not patched
        patched.add(module)
        if is_first:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    return patch


def speed_up():
    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_lang"):
        interpreter._patch_builtin = patch_builtins
        interpreter._patch_lang = patching_once(interpreter._patch_lang)
