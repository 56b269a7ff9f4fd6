"""An accelerator with real numbers on a machine that has none.

Torch reserves a device type, PrivateUse1, for hardware that it does not know. Here that type is a plain CPU
tensor in a wrapper: each operation is unwrapped, run on the CPU, and wrapped again. Results are bit-equal to
the CPU's, yet code that mixes devices raises, and each wait of the host for the device is counted, as
neither a CPU run nor the ``meta`` device can do.

What differs from a GPU: no sparse layouts, no fused recurrent cells, no in-place change of a tensor's shape,
no generator of its own (a CPU generator is refused, as CUDA refuses it); backward runs in the thread that
calls it, and torch aborts in the backward of ``torch.utils.checkpoint``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DeviceMismatchError", "count_host_syncs", "emulated_device"]

NAME = "emulated"


class DeviceMismatchError(RuntimeError):
    """A CPU tensor met a tensor of the emulated device in one operation."""


def emulated_device() -> torch.device:
    """Return a device whose tensors live on the CPU and behave as if they did not.

    The first call installs the device for the life of the process; later calls are free. Until then torch
    is untouched.

    Returns
    -------
    torch.device
        ``emulated:0``. Modules, autograd, ``torch.func``, optimisers and ``torch.linalg`` work on it.

    Raises
    ------
    RuntimeError
        If torch's private interface has moved, or if the process already has another PrivateUse1 device.

    Notes
    -----
    Source: torch's own hook for Python backends, ``_setup_privateuseone_for_python_backend``.

    Examples
    --------
    >>> import torch
    >>> from geomlib.testing import emulated_device
    >>> device = emulated_device()
    >>> x = torch.ones(2, device=device)
    >>> (x + x).cpu()
    tensor([2., 2.])
    >>> x + torch.ones(2)
    Traceback (most recent call last):
        ...
    geomlib.testing.emulated.DeviceMismatchError: aten.add.Tensor: a cpu tensor of shape (2,) met a tensor...
    """
    with _INSTALLATION:
        if not _STATE.libraries:
            _install()
    if not getattr(_THREAD, "ready", False):
        # Both settings are per thread. Autograd gives each device a worker thread when the first backward of
        # the process runs, and a device that comes later gets none; so backward runs in the calling thread.
        torch.autograd.set_multithreading_enabled(False)
        _PythonData().__enter__()
        _THREAD.ready = True
    return torch.device(NAME, 0)


@contextmanager
def count_host_syncs() -> Iterator[list[str]]:
    """Record the operations that make the host wait for the emulated device.

    Reading a number (``.item()``, ``bool(tensor)``, ``.tolist()``), copying to the CPU, and operations whose
    output size depends on the data (``nonzero``, boolean masks, ``unique``) all wait. Error-checked linear
    algebra (``torch.linalg.solve`` and ``inv``) waits once as well.

    Yields
    ------
    list of str
        Grows as operations run, so that its length is the number of waits so far.

    Examples
    --------
    >>> import torch
    >>> from geomlib.testing import count_host_syncs, emulated_device
    >>> x = torch.ones(3, device=emulated_device())
    >>> with count_host_syncs() as syncs:
    ...     y = x.exp().sum()
    ...     value = y.item()
    >>> syncs
    ['aten._local_scalar_dense.default']
    """
    record: list[str] = []
    _STATE.records.append(record)
    try:
        yield record
    finally:
        # By identity: two empty records are equal, and the outer one must survive the inner one.
        _STATE.records = [other for other in _STATE.records if other is not record]


class _State:
    """What is installed, and who is counting."""

    def __init__(self) -> None:
        self.libraries: list[torch.library.Library] = []
        self.records: list[list[str]] = []


_STATE = _State()
_INSTALLATION = threading.Lock()
_THREAD = threading.local()


def _install() -> None:
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(NAME)
        library = torch.library.Library("_", "IMPL")
        library.fallback(lambda op, *args, **kwargs: _dispatch(op, args, kwargs), "PrivateUse1")
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        raise RuntimeError(
            f"the emulated device needs a private interface that torch {torch.__version__} does not offer "
            f"as expected: {error}"
        ) from error
    _STATE.libraries.append(library)


class EmulatedTensor(Tensor):
    """A tensor whose data is the CPU tensor ``raw`` and whose device is the emulated one."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> EmulatedTensor:
        """Wrap ``raw`` without copying it."""
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, 0),
        )
        wrapper.raw = raw
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on the CPU payloads."""
        return _dispatch(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.raw!r} on {NAME}"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def tolist(self) -> Any:
        """Return the numbers as nested lists, which makes the host wait."""
        return self.cpu().tolist()


_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
# The second argument of these is a list of indices, and indices may stay on the CPU, as with CUDA.
_INDEXING = {
    _aten.index.Tensor,
    _aten._unsafe_index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
    _aten._linalg_check_errors.default,
}


def _dispatch(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.Tag.inplace_view in op.tags:
        raise NotImplementedError(f"{op} changes a tensor's shape in place, which is not emulated")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    emulated = {id(t.raw): t for t in tensors if isinstance(t, EmulatedTensor)}
    asked = kwargs.get("device")
    to_emulated = torch.device(asked).type == NAME if asked is not None else bool(emulated)
    if emulated and op not in _COPIES:
        _refuse_mixed_devices(op, args, kwargs)
    if to_emulated and kwargs.get("generator") is not None:
        raise RuntimeError(
            f"{op}: expected a generator of the {NAME} device, got one of the cpu: draw, then move"
        )
    if emulated and _waits(op, args, to_emulated):
        for record in _STATE.records:
            record.append(str(op))

    if asked is not None and to_emulated:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = op(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if any(t.raw.shape != t.shape for t in emulated.values()):
        raise NotImplementedError(f"{op} resized a tensor that it was given, which is not emulated")
    if op is _aten.copy_.default:
        return args[0]

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or not to_emulated:
            return value
        # An in-place operation returns the tensor it was given, so it must return the same wrapper.
        return emulated[id(value)] if id(value) in emulated else EmulatedTensor(value)

    return tree_map(wrap, result)


def _unwrap(value: Any) -> Any:
    return value.raw if isinstance(value, EmulatedTensor) else value


def _refuse_mixed_devices(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    checked = (args[:1] + args[2:], kwargs) if op in _INDEXING else (args, kwargs)
    for leaf in tree_leaves(checked):
        # A CPU tensor without dimensions counts as a number, as it does beside CUDA tensors.
        if isinstance(leaf, Tensor) and not isinstance(leaf, EmulatedTensor) and leaf.dim() > 0:
            raise DeviceMismatchError(
                f"{op}: a cpu tensor of shape {tuple(leaf.shape)} met a tensor of the {NAME} device"
            )


def _waits(op: Any, args: tuple[Any, ...], to_emulated: bool) -> bool:
    if op in _WAITS:
        return True
    if op is _aten._to_copy.default:
        return not to_emulated
    if op is _aten.copy_.default:
        return isinstance(args[1], EmulatedTensor) and not isinstance(args[0], EmulatedTensor)
    # A boolean mask is turned into positions, whose number only the device knows.
    return op in _INDEXING and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


class _PythonData(TorchFunctionMode):
    """Make tensors of Python numbers on the CPU and move them, which torch cannot do for such a device.

    They come by ``torch.tensor(data, device="emulated")`` and by ``x[[0, 2]] = number``. The same holds for
    ``eye`` and ``arange``, which torch makes empty first and then resizes.
    """

    _FACTORIES: tuple[Callable[..., Tensor], ...] = (
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        torch.eye,
        torch.arange,
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and isinstance(args[0], EmulatedTensor):
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], EmulatedTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(entry) if isinstance(entry, list) else entry for entry in index)
            args = (args[0], index, *args[2:])
            if len(args) == 3 and not isinstance(args[2], Tensor):
                args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        device = kwargs.get("device")
        if func in self._FACTORIES and device is not None and torch.device(device).type == NAME:
            del kwargs["device"]
            requires_grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(device).requires_grad_(requires_grad)
        return func(*args, **kwargs)
