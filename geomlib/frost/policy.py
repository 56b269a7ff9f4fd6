r"""From scores to a threshold, and a model saved together with it.

The paper takes a quantile of all halting scores as threshold (arXiv 2601.19551, section 4.4). Its level `q`
is a share of states, not a depth; a target for the mean depth is met by a quantile of the running maxima of
the scores instead, see `curves`. A model without its threshold does not say when it stops, so both live in
one file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geomlib.frost.curves import check_threshold, crossing_depths, depth_threshold
from geomlib.frost.halting import Halted, HaltingWarning, infer, unroll_signals
from geomlib.frost.learned import OptimalStopping
from geomlib.frost.rules import RULES, RankScore, Rule, find_rule
from geomlib.frost.sketch import KLLSketch, QuantileSketch
from geomlib.frost.unrolled import Unrolled

__all__ = ["HaltingPolicy", "calibrate"]

KEY = "geomlib_policy"
# Share of the calibration scores that may stand at the threshold before it counts as an atom.
LARGEST_ATOM = 0.02
# Share of the range of levels or depths by which a threshold may miss its target.
LARGEST_MISS = 0.02
# Width of an atom relative to 1 + |threshold|: equal states differ by rounding.
ATOM_WIDTH = 1e-5


@dataclass(frozen=True, eq=False)
class HaltingPolicy:
    """When a model stops: rule, threshold, and where they come from.

    Attributes
    ----------
    threshold
        Signals above it stop a sample.
    q
        Its quantile level among the calibration scores from step `t_min` on.
    t_min, steps
        First step at which a sample may stop, and the last.
    depth
        Mean depth on the calibration split.
    atom
        Share of the calibration scores that stand at the threshold up to rounding.
    calibration
        Which split it was, a digest of its inputs unless named.
    sketch
        Of the calibration scores from step `t_min` on; it holds their quantiles for other levels.
    rule
        What signals.

    Raises
    ------
    ValueError
        If the threshold is NaN, or `q` or `t_min` is out of range.

    Examples
    --------
    >>> policy = HaltingPolicy(threshold=0.3, q=0.5, t_min=2, steps=12)
    >>> policy
    HaltingPolicy(threshold=0.3, q=0.5, t_min=2, steps=12, rule=RankScore)
    """

    threshold: float
    q: float
    t_min: int
    steps: int
    depth: float = math.nan
    atom: float = 0.0
    calibration: str = ""
    sketch: QuantileSketch = field(default_factory=KLLSketch)
    rule: Rule = field(default_factory=RankScore)

    def __post_init__(self) -> None:
        check_threshold(self.threshold, self.t_min, self.steps)
        if not 0 <= self.q <= 1:
            raise ValueError(f"q must lie in [0, 1], got {self.q}: it is a share of the scores")

    def __repr__(self) -> str:
        return (
            f"HaltingPolicy(threshold={self.threshold:.6g}, q={self.q:.4g}, t_min={self.t_min}, "
            f"steps={self.steps}, rule={type(self.rule).__name__})"
        )

    @classmethod
    def from_sketch(
        cls, sketch: QuantileSketch, q: float, *, t_min: int = 1, steps: int, rule: Rule | str = "score"
    ) -> HaltingPolicy:
        """Return the policy whose threshold is the quantile `q` of a sketch, such as one filled in training.

        Level 1 stops nothing before the end, level 0 everything at `t_min`: scores that have not been seen
        may lie outside the extremes. An empty sketch gives full depth.

        Raises
        ------
        ValueError
            If `q` or `t_min` is out of range.

        Warns
        -----
        HaltingWarning
            If the sketch is empty.

        Examples
        --------
        >>> sketch = KLLSketch()
        >>> sketch.update(torch.arange(10.0))
        >>> HaltingPolicy.from_sketch(sketch, 0.5, steps=12).threshold
        4.0
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must lie in [0, 1], got {q}: it is a share of the scores")
        if sketch.n == 0:
            warnings.warn(
                "the sketch is empty: the threshold is infinite and every sample runs to full depth",
                HaltingWarning,
                stacklevel=2,
            )
            q = 1.0
        threshold = {0.0: -math.inf, 1.0: math.inf}.get(float(q))
        if threshold is None:
            threshold = sketch.quantile(q)
        return cls(threshold, float(q), t_min, steps, sketch=sketch, rule=find_rule(rule))

    def infer(self, model: Unrolled, inputs: Tensor, *, compact: float = 1.0) -> Halted:
        """Answer a batch with this policy, see :func:`geomlib.frost.infer`."""
        return infer(
            model,
            inputs,
            self.threshold,
            rule=self.rule,
            steps=self.steps,
            t_min=self.t_min,
            compact=compact,
        )

    def save(self, path: str | Path, model: Unrolled) -> None:
        """Write model and policy into one safetensors file, in place of an earlier one.

        Parameters
        ----------
        path
            Its folder is made if need be. Written beside its place and renamed into it, so that a reader
            finds the file before or the file after.
        model
            Weights are stored under `model.<name>`, sketch and rule under `sketch.` and `rule.`.

        Raises
        ------
        ValueError
            If the rule is one that was not made here.

        Examples
        --------
        >>> from geomlib.frost import vector
        >>> model, policy = vector(3, 4), HaltingPolicy(threshold=0.3, q=0.5, t_min=2, steps=12)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     policy.save(Path(folder) / "model.safetensors", model)
        ...     HaltingPolicy.load(Path(folder) / "model.safetensors", model)
        HaltingPolicy(threshold=0.3, q=0.5, t_min=2, steps=12, rule=RankScore)
        """
        name = type(self.rule).__name__
        if _known_rules().get(name) is not type(self.rule):
            raise ValueError(
                f"rule must be one of {', '.join(_known_rules())} to be saved, got {name}: nothing could "
                "load it"
            )
        numbers = [self.threshold, self.q, self.depth, self.atom]
        tensors = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        for part, state in (
            ("model", model.state_dict()),
            ("sketch", self.sketch.state_dict()),
            ("rule", self.rule.state_dict()),
        ):
            tensors |= {f"{part}.{name}": value for name, value in state.items()}
        rest = {
            "t_min": self.t_min,
            "steps": self.steps,
            "calibration": self.calibration,
            "rule": [name, self.rule.options],
        }
        _write_whole(Path(path), tensors, json.dumps(rest))

    @classmethod
    def load(
        cls, path: str | Path, model: Unrolled, *, sketch: QuantileSketch | None = None
    ) -> HaltingPolicy:
        """Load the weights into `model` and return the policy that was saved with them.

        Depths are those of the saved pair, bit for bit where the same kernels run.

        Parameters
        ----------
        path
            A file of :meth:`save`.
        model
            Built as the saved one was.
        sketch
            An empty sketch to restore into, if it was not a `KLLSketch`.

        Raises
        ------
        ValueError
            If the file is no policy, is damaged, or belongs to another model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                rest = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"policy {path} cannot be read: {error!r}") from error
        try:
            model.load_state_dict(_part(tensors, "model"))
        except RuntimeError as error:
            raise ValueError(f"policy {path} belongs to another model: {error}") from error
        name, options = rest["rule"]
        known = _known_rules()
        if name not in known:
            raise ValueError(f"policy {path} has the rule {name!r}, which is not one of {', '.join(known)}")
        rule = known[name](**options)
        rule.load_state_dict(_part(tensors, "rule"))
        rule.to(next(model.parameters()).device)
        sketch = KLLSketch() if sketch is None else sketch
        sketch.load_state_dict(_part(tensors, "sketch"))
        threshold, q, depth, atom = tensors["numbers"].tolist()
        return cls(threshold, q, rest["t_min"], rest["steps"], depth, atom, rest["calibration"], sketch, rule)


def calibrate(
    model: Unrolled,
    inputs: Tensor,
    *,
    q: float | None = None,
    target_depth: float | None = None,
    rule: Rule | str = "score",
    steps: int | None = None,
    t_min: int = 1,
    batch_size: int = 512,
    calibration: str | None = None,
    generator: torch.Generator | None = None,
) -> HaltingPolicy:
    """Choose the threshold of a trained model on a split that it was not trained on.

    Parameters
    ----------
    model
        Run in evaluation mode; its mode is restored.
    inputs
        `(N, ...)`, no labels needed.
    q
        Quantile level among all scores from step `t_min` on, as in the paper. Either this,
    target_depth
        or the mean depth to reach, in `[t_min, steps]`.
    rule, steps, t_min
        See :func:`geomlib.frost.infer`.
    batch_size
        Samples at a time.
    calibration
        Name of the split; by default a digest of `inputs`.
    generator
        Seeds the sketch.

    Returns
    -------
    HaltingPolicy
        With the mean depth it really has on this split.

    Raises
    ------
    ValueError
        If not one of `q` and `target_depth` is given, a number is out of range, or there are no samples.

    Warns
    -----
    HaltingWarning
        If the target is missed by more than 2 % of its range, or as many scores stand at the threshold up to
        rounding (an atom: before information arrives, all samples share one state). No threshold splits an
        atom; it is moved to the edge that misses the target less, so that rounding decides nothing.

    Notes
    -----
    Source: arXiv 2601.19551, section 4.4, for `q`; there the scores of training and validation are taken, and
    those of a calibration split here, because early ones are stale. Target depth: reconstructed, see
    :func:`geomlib.frost.depth_threshold`.

    Examples
    --------
    >>> from geomlib.frost import vector
    >>> model = vector(3, 4, width=8, steps=5, generator=torch.Generator().manual_seed(0))
    >>> inputs = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> policy = calibrate(model, inputs, target_depth=2.5)
    >>> round(policy.depth, 3), policy.infer(model, inputs).depth.float().mean()
    (2.5, tensor(2.5000))
    """
    if (q is None) == (target_depth is None):
        raise ValueError(f"either q or target_depth must be given, got {q} and {target_depth}")
    if q is not None and not 0 <= q <= 1:
        raise ValueError(f"q must lie in [0, 1], got {q}: it is a share of the scores")
    if len(inputs) == 0:
        raise ValueError(f"inputs must hold samples, got {tuple(inputs.shape)}: there are no scores to rank")
    rule = find_rule(rule)
    steps = model.steps if steps is None else steps
    check_threshold(0.0, t_min, steps)
    signal = unroll_signals(model, inputs, rule=rule, steps=steps, batch_size=batch_size).cpu()
    scores = signal[:, t_min - 1 :]
    sketch = KLLSketch(generator=generator)
    sketch.update(scores)
    if target_depth is not None:
        threshold = depth_threshold(signal, target_depth, t_min=t_min)
    else:
        assert q is not None
        threshold = HaltingPolicy.from_sketch(sketch, q, t_min=t_min, steps=steps).threshold

    def level(threshold: float) -> float:
        return (scores <= threshold).double().mean().item()

    def depth(threshold: float) -> float:
        return crossing_depths(signal, threshold, t_min=t_min).double().mean().item()

    def miss(threshold: float) -> float:
        if target_depth is not None:
            return abs(depth(threshold) - target_depth) / max(1, steps - t_min)
        assert q is not None
        return abs(level(threshold) - q)

    near = (scores - threshold).abs() <= ATOM_WIDTH * (1 + abs(threshold))
    atom = near.double().mean().item() if math.isfinite(threshold) else 0.0
    if atom > LARGEST_ATOM:
        edge = ATOM_WIDTH * (1 + abs(threshold))
        threshold = min(float(scores[near].min()) - edge, float(scores[near].max()) + edge, key=miss)
    if atom > LARGEST_ATOM or miss(threshold) > LARGEST_MISS:
        warnings.warn(
            f"the threshold misses its target by {miss(threshold):.0%} of the range, the mean depth is "
            f"{depth(threshold):.3g}: scores are tied; a larger t_min leaves out steps at which all samples "
            "look alike",
            HaltingWarning,
            stacklevel=2,
        )
    return HaltingPolicy(
        threshold,
        level(threshold) if q is None else float(q),
        t_min,
        steps,
        depth(threshold),
        atom,
        _digest(inputs) if calibration is None else calibration,
        sketch,
        rule,
    )


def _known_rules() -> dict[str, type[Rule]]:
    return {rule.__name__: rule for rule in (*RULES.values(), OptimalStopping)}


def _digest(inputs: Tensor) -> str:
    content = inputs.detach().cpu().contiguous()
    head = f"{tuple(content.shape)} {content.dtype} "
    body = content.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(head.encode() + body).hexdigest()[:16]


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        # Copied, because tied weights share memory, which the format has no word for.
        copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        save_file(copies, scratch, metadata={KEY: metadata})
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
