"""Triton's interpreter in less time: work that it repeats at every call is done once.

While a kernel runs, the interpreter replaces the functions of Triton's language by its own, and
does so again whenever a kernel calls a function, by `_patch_lang` in Triton 3.6 to 3.9.
"""

from triton.runtime import interpreter


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
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = patching_once(interpreter._patch_lang)
