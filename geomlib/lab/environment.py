"""Where a chapter runs: versions, device, and how to get a faster one."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch

import geomlib

__all__ = ["device", "report"]


def device() -> torch.device:
    """Return the fastest device of this machine: a CUDA, XPU or Apple GPU, else the CPU.

    Examples
    --------
    >>> from geomlib.lab import environment
    >>> environment.device().type in ("cuda", "xpu", "mps", "cpu")
    True
    """
    # Named one by one: `torch.accelerator` would also offer the emulated device of the tests.
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.xpu.is_available():
        return torch.device("xpu")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def report() -> None:
    """Print the versions, the device, and one sentence on getting a GPU where there is none.

    Examples
    --------
    >>> from geomlib.lab import environment
    >>> environment.report()
    geomlib ..., torch ..., Python ..., device ...
    """
    found = device()
    name = f" ({torch.cuda.get_device_name()})" if found.type == "cuda" else ""
    print(
        f"geomlib {geomlib.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"device {found.type}{name}"
    )
    if found.type == "cpu":
        print(_advice())


def _advice() -> str:
    if importlib.util.find_spec("google") and importlib.util.find_spec("google.colab"):
        return "No GPU: choose Runtime > Change runtime type > T4 GPU in the menu, then run all cells again."
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "No GPU: choose Settings > Accelerator > GPU in the menu, then run all cells again."
    return (
        "No GPU: the quick preset needs none; for the full one, open this chapter in Colab and choose "
        "Runtime > Change runtime type > T4 GPU."
    )
