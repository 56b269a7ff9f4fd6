"""What a chapter needs beside a model: data, training, presets, claims, pictures and sliders.

Modules are loaded when they are first used, so ``import geomlib.lab`` costs nothing.
"""

from importlib import import_module
from types import ModuleType

__all__ = ["claims", "data", "environment", "presets", "results", "training", "viz"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
