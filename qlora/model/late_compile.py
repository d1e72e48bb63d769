"""bitsandbytes, imported without torch's compiler, which is a sixth of the time in which a command starts.

It wraps four of its functions in ``torch.compile`` while it is imported, and that loads the whole compiler. They are no CPU's and
no NVIDIA card's, which have kernels of their own; where one is called after all, it is compiled then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_compile = torch.compile


def _later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    if function is None:
        return functools.partial(_later, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return _compile(function, **options)

    @functools.wraps(function)
    def first(*given: Any, **named: Any) -> Any:
        return compiled()(*given, **named)

    return first


torch.compile = _later  # type: ignore[assignment]
try:
    import bitsandbytes  # noqa: F401
finally:
    torch.compile = _compile
