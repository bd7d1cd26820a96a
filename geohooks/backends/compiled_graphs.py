"""Graphs that torch.compile made before the hooks came, and that would never call them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, reset_code, set_code_exec_strategy

from geohooks import measures

__all__ = ["forget_compiled_graphs", "untraced"]

Hook = TypeVar("Hook", bound=Callable[..., Any])

_MEASURES = str(Path(measures.__file__).parent)


def forget_compiled_graphs() -> None:
    """Have what this process has compiled so far be compiled anew at its next call, with the hooks that are there then.

    torch.compile does not guard on hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`), and a model may be
    compiled as part of any function, so every graph is forgotten but those of `geohooks.measures`, which run no module.
    """
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    if convert_frame is None:
        return
    for reference in tuple(convert_frame.input_codes.seen):
        code = reference()
        if code is not None and not code.co_filename.startswith(_MEASURES):
            reset_code(code)


def untraced(function: Hook) -> Hook:
    """`function`, at which torch.compile breaks its graph; neither it nor what it calls is compiled.

    As `torch.compiler.disable` does it, but without a wrapper around each call and without importing the compiler.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
