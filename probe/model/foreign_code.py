"""Code that a model's folder or a hub brings: none of it runs, whatever class a file names.

Every call of transformers says `trust_remote_code=False`; but some are made by transformers itself, on the parts of a
configuration, and there it asks whoever sits at the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_foreign_code() -> Iterator[None]:
    """While it is open, transformers asks nobody, loads no Python file and no kernel. Raises ValueError where one is named."""
    from transformers import dynamic_module_utils as files
    from transformers.integrations import hub_kernels as kernels

    before = files.get_class_in_module, files.TIME_OUT_REMOTE_CODE, kernels.load_and_register_attn_kernel
    files.get_class_in_module, files.TIME_OUT_REMOTE_CODE = _refuse_file, 0
    kernels.load_and_register_attn_kernel = _refuse_kernel
    try:
        yield
    finally:
        files.get_class_in_module, files.TIME_OUT_REMOTE_CODE, kernels.load_and_register_attn_kernel = before


def _refuse_file(class_name: str, *_: Any, **__: Any) -> Any:
    raise ValueError(
        f"it names the class {class_name} of a Python file beside it, and such files are never run"
    )


def _refuse_kernel(name: str, *_: Any, **__: Any) -> Any:
    raise ValueError(f"its attention is the kernel {name} of a hub, and such code is never run")
