r"""Following the dimension of every layer while a network is trained.

What moves during training is small against what shape and density decide, so each record holds the null of
the same shape beside the dimension. Between records the tracker only counts: it reads no number from the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from geomlib.weightspace.layers import LayerReport, layer_dimension, weight_tensors
from geomlib.weightspace.layouts import lay_out
from geomlib.weightspace.transform import as_signal

__all__ = ["FractalTracker", "TrackRecord"]


@dataclass(frozen=True, eq=False)
class TrackRecord:
    """One layer at one time.

    Attributes
    ----------
    step : int
        Number of the step or epoch, 0 before training.
    report : LayerReport
        Of the layer.
    measures : dict of str to float
        What else was measured of its grid.
    """

    step: int
    report: LayerReport
    measures: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return one row of a table.

        Examples
        --------
        >>> record = FractalTracker(nn.Linear(32, 32)).records[0]
        >>> record.as_dict()["step"], record.as_dict()["name"]
        (0, 'weight')
        """
        return {"step": self.step} | self.report.as_dict() | self.measures


class FractalTracker:
    """Store the reports of a network's layers while it is trained.

    Call it at the end of each epoch with the number of the epoch, which is the signature of the `on_epoch`
    argument of training loops; or call `step()` after each step of an optimiser, or `attach` it to one.

    Parameters
    ----------
    model : Module
        Read, never changed.
    every : int
        Epochs, or steps, from record to record.
    names : collection of str, optional
        Tensors to follow, as `model_report` calls them; all by default.
    measures : mapping of str to callable, optional
        Further numbers per layer, each a function of the grid `(rows, columns)` in float32 or float64; only
        for layouts of one grid.
    start : bool
        Whether to record the network as it is now, as step 0.
    **options
        Of `layer_dimension`.

    Raises
    ------
    ValueError
        If `every` is below 1, a name does not exist, or a measure is named like a column of the reports.

    Notes
    -----
    Source: reconstructed; arXiv 2503.14298 speaks of fractal dynamics that depend on the architecture. A
    curve of `D` alone shows the shape of the layer first; `delta` and the measures of permuted copies say
    what training did.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    >>> tracker = FractalTracker(
    ...     model, every=2, names=["0.weight"], measures={"rms": lambda w: w.square().mean().sqrt()}
    ... )
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = tracker.attach(optimizer)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(1, 16)).sum().backward()
    ...     optimizer.step()
    >>> tracker.series("0.weight", "rms")[0]
    [0, 2, 4]
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        *,
        names: Collection[str] | None = None,
        measures: Mapping[str, Callable[[Tensor], Tensor | float]] | None = None,
        start: bool = True,
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}: nothing would be recorded")
        known = [tensor.name for tensor in weight_tensors(model)]
        if unknown := sorted(set(names or ()) - set(known)):
            raise ValueError(
                f"names must be weight tensors of the model, got {', '.join(unknown)}: "
                f"it has {', '.join(known)}"
            )
        columns = {"step", "se", "r2", "scales", "low", "high", *LayerReport.__dataclass_fields__}
        if taken := sorted(columns & set(measures or ())):
            raise ValueError(f"measures must have names of their own, got {', '.join(taken)}")
        self.model, self.every, self.options = model, every, options
        self.names = None if names is None else frozenset(names)
        self.measures = dict(measures or {})
        self.records: list[TrackRecord] = []
        self.steps = 0
        if start:
            self.record(0)

    def __call__(self, epoch: int, history: object = None) -> None:
        """Record the network if the epoch is a multiple of `every`; `history` is not looked at.

        Examples
        --------
        >>> tracker = FractalTracker(nn.Linear(32, 32), every=5)
        >>> for epoch in range(1, 11):
        ...     tracker(epoch)
        >>> tracker.series("weight", "status")
        ([0, 5, 10], ['ok', 'ok', 'ok'])
        """
        if epoch % self.every == 0:
            self.record(epoch)

    def step(self) -> None:
        """Count a step, and record the network if the count is a multiple of `every`.

        Examples
        --------
        >>> tracker = FractalTracker(nn.Linear(32, 32), every=2, start=False)
        >>> tracker.step(), tracker.step(), len(tracker.records)
        (None, None, 1)
        """
        self.steps += 1
        self(self.steps)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Call `step()` after each step of an optimiser, until the handle is removed.

        Examples
        --------
        >>> import torch
        >>> model = nn.Linear(8, 8)
        >>> FractalTracker(model).attach(torch.optim.SGD(model.parameters(), lr=0.1)).remove()
        """
        return optimizer.register_step_post_hook(lambda *_: self.step())

    def record(self, step: int) -> None:
        """Record the network now, as the given step.

        Examples
        --------
        >>> tracker = FractalTracker(nn.Linear(32, 32))
        >>> tracker.record(100)
        >>> [record.step for record in tracker.records]
        [0, 100]
        """
        for tensor in weight_tensors(self.model):
            if self.names is not None and tensor.name not in self.names:
                continue
            report = layer_dimension(tensor.values, name=tensor.name, **tensor.geometry, **self.options)
            measured = {}
            if self.measures:
                grid = lay_out(
                    as_signal(tensor.values.detach(), tensor.name), report.layout, **tensor.geometry
                )
                if grid.copies > 1:
                    raise ValueError(f"measures need a layout of one grid, got {grid}: pass layout='matrix'")
                measured = {name: float(measure(grid.values[0])) for name, measure in self.measures.items()}
            self.records.append(TrackRecord(step, report, measured))

    def series(self, name: str, column: str = "delta") -> tuple[list[int], list[Any]]:
        """Return the steps and the values of one column of one layer.

        Parameters
        ----------
        name : str
            Of the tensor.
        column : str
            A field of `LayerReport.as_dict` or a measure.

        Returns
        -------
        steps, values : list

        Raises
        ------
        ValueError
            If the tensor was not recorded or has no such column.

        Examples
        --------
        >>> FractalTracker(nn.Linear(32, 32)).series("weight", "density")
        ([0], [0.099609375])
        """
        rows = [row for record in self.records if (row := record.as_dict())["name"] == name]
        if not rows or column not in rows[0]:
            recorded = ", ".join(dict.fromkeys(record.report.name for record in self.records)) or "nothing"
            raise ValueError(
                f"name and column must have been recorded, got {name!r} and {column!r}; there is {recorded}"
            )
        return [row["step"] for row in rows], [row[column] for row in rows]

    def __repr__(self) -> str:
        layers = {record.report.name for record in self.records}
        last = self.records[-1].step if self.records else math.nan
        return f"FractalTracker({len(layers)} tensors, {len(self.records)} records, last step {last})"
