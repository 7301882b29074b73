"""Triton's interpreter without what it does in vain, which is most of its time: a module takes a third."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _NothingChanged:
    def restore(self) -> None:
        pass


def install() -> None:
    """For this process.

    The interpreter computes whether each sum and product of integers overflows, which is said only where ``debug`` is set as
    well. And whenever a kernel calls a function it replaces anew all that ``triton.language`` has, as it did for the kernel.
    """
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch: Callable[[Any], Any] = interpreter._patch_lang
    execute: Callable[..., None] = interpreter.GridExecutor.__call__
    patched: set[frozenset[str]] = set()

    def patch_once(fn: Any) -> Any:
        """Once in a launch for functions that see ``triton.language``, and once for those that see its core, as its own do."""
        modules = (value for value in fn.__globals__.values() if inspect.ismodule(value))
        seen = frozenset(module.__name__ for module in modules if module in (tl, tl.core))
        if seen in patched:
            return _NothingChanged()
        scope = patch(fn)
        patched.add(seen)
        return scope

    def execute_patched_anew(*arguments: Any, **options: Any) -> None:
        patched.clear()
        try:
            execute(*arguments, **options)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = execute_patched_anew
