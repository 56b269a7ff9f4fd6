"""Three sizes of every chapter, shown side by side: seconds, a minute and a half, the paper's own.

``smoke`` proves that the cells run, ``quick`` is what the book stores and judges, ``full`` is the scale of
the paper, for a GPU. The preset that is chosen also decides what :func:`geomlib.lab.claims.claim` may judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from geomlib.lab.output import publish, table

__all__ = ["NAMES", "Settings", "choose", "current"]

NAMES = ("smoke", "quick", "full")


class Settings(SimpleNamespace):
    """The knobs of the chosen preset, as attributes; ``preset`` is its name.

    Examples
    --------
    >>> from geomlib.lab.presets import Settings
    >>> Settings(preset="quick", epochs=3).epochs
    3
    """

    preset: str

    def __getattr__(self, name: str) -> Any:
        knobs = ", ".join(sorted(set(vars(self)) - {"preset"}))
        raise AttributeError(f"no knob is called {name!r}: this chapter has {knobs}")


def choose(
    preset: str, *, smoke: Mapping[str, Any], quick: Mapping[str, Any], full: Mapping[str, Any]
) -> Settings:
    """Show the three presets of a chapter and return the knobs of one.

    Parameters
    ----------
    preset : str
        ``"smoke"``, ``"quick"`` or ``"full"``.
    smoke, quick, full : mapping
        The same keys in each, every key an identifier.

    Returns
    -------
    Settings
        The knobs as attributes, and the name as ``preset``.

    Raises
    ------
    ValueError
        If the preset is unknown, the keys differ, or a knob is called ``preset``.

    Examples
    --------
    >>> from geomlib.lab import presets
    >>> settings = presets.choose("quick", smoke={"epochs": 1}, quick={"epochs": 5}, full={"epochs": 200})
    Presets of this chapter; this run uses quick
            smoke  quick (this run)  full
    epochs  1      5                 200
    >>> settings.epochs
    5
    """
    if preset not in NAMES:
        raise ValueError(f"PRESET must be one of {', '.join(NAMES)}, got {preset!r}: it names no settings")
    columns = dict(zip(NAMES, (smoke, quick, full), strict=True))
    for name, knobs in columns.items():
        if differing := set(knobs) ^ set(smoke):
            raise ValueError(
                f"presets must have the same knobs, got a difference between smoke and {name} in "
                f"{', '.join(sorted(differing))}: a cell would find no value"
            )
    if "preset" in smoke:
        raise ValueError("no knob may be called preset, got one: it would hide the preset's name")
    global _current
    _current = preset
    plain, html = table(
        ["", *(f"{name} (this run)" if name == preset else name for name in NAMES)],
        [[knob, *(_shown(columns[name][knob]) for name in NAMES)] for knob in smoke],
        caption=f"Presets of this chapter; this run uses {preset}",
        marked=1 + NAMES.index(preset),
    )
    publish(plain, html)
    return Settings(preset=preset, **columns[preset])


def current() -> str | None:
    """Return the preset that was chosen last in this process, ``None`` before the first choice.

    Examples
    --------
    >>> from geomlib.lab import presets
    >>> presets.current() in (None, *presets.NAMES)
    True
    """
    return _current


_current: str | None = None


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list, range)):
        return ", ".join(_shown(entry) for entry in value) or "none"
    return str(value)
