"""The state of a training run in one safetensors file: tensors as they are, everything else as JSON.

Nothing is unpickled, so a checkpoint from a stranger can be read. The file is written beside its place and
renamed into it, so a run that is killed leaves the state before or the state after.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["restore", "save"]

KEY = "geomlib_checkpoint"


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    history: Mapping[str, list[float]],
    identity: Mapping[str, Any],
) -> None:
    """Write the state of a run, in place of an earlier one.

    Parameters
    ----------
    path : str or Path
        Its folder is made if need be.
    model, optimizer : Module, Optimizer
        Weights are stored under ``model.<name>``, the optimiser's tensors under ``optimizer.<index>.<name>``.
    history : mapping
        Lists of numbers.
    identity : mapping
        What :func:`restore` must find again; JSON.

    Raises
    ------
    TypeError
        If the model or the optimiser holds something that is neither a tensor nor JSON.

    Examples
    --------
    >>> import tempfile, pathlib, torch
    >>> from geomlib.lab import checkpoints
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "run.safetensors"
    ...     checkpoints.save(path, model, optimizer, history={"loss": [0.5]}, identity={"seed": 0})
    ...     checkpoints.restore(path, model, optimizer, identity={"seed": 0})
    {'loss': [0.5]}
    """
    state = optimizer.state_dict()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(value).__name__}: a checkpoint cannot hold it"
            )
    rest = {
        "identity": dict(identity),
        "history": dict(history),
        "groups": state["param_groups"],
        "numbers": numbers,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        # Copied, because tied weights share memory, which the format has no word for.
        copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        save_file(copies, scratch, metadata={KEY: json.dumps(rest)})
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def restore(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, identity: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Load the state of a run into ``model`` and ``optimizer`` and return its history.

    Raises
    ------
    ValueError
        If the file is no checkpoint, is damaged, or belongs to a run with another identity or model.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab import checkpoints
    >>> model = torch.nn.Linear(2, 1)
    >>> checkpoints.restore("setup.cfg", model, torch.optim.SGD(model.parameters()), identity={})
    Traceback (most recent call last):
        ...
    ValueError: checkpoint setup.cfg cannot be read: ...
    """
    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error!r}; delete it to start anew") from error
    for name, value in identity.items():
        before = rest["identity"].get(name)
        if before != value:
            raise ValueError(
                f"checkpoint {path} was written with {name} {before}, got {value}: the curve would belong to "
                "neither; delete it or choose another path"
            )
    weights = {
        name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} belongs to another model: {error}") from error
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in rest["numbers"].items()
    }
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".", 2)
            state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    history: dict[str, list[float]] = rest["history"]
    return history
