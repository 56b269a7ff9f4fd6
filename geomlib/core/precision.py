"""The precision that iterations and proofs run in: never below float32, whatever the model uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["full_precision", "working_dtype"]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half-precision types, and every other type as it is.

    Examples
    --------
    >>> import torch
    >>> working_dtype(torch.bfloat16), working_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off on a device, where it has one: residuals of half-precision products mean nothing.

    Examples
    --------
    >>> import torch
    >>> with torch.autocast("cpu"), full_precision(torch.device("cpu")):
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
