"""Assertions that tests and readers share: gradients, contraction, equivariance, memory, devices.

Nothing here is imported by the library itself, and :func:`emulated_device` touches torch only when it is
called.
"""

from geomlib.testing.assertions import (
    assert_contraction,
    assert_equivariant,
    assert_gradients,
    saved_tensor_bytes,
)
from geomlib.testing.emulated import DeviceMismatchError, count_host_syncs, emulated_device

__all__ = [
    "DeviceMismatchError",
    "assert_contraction",
    "assert_equivariant",
    "assert_gradients",
    "count_host_syncs",
    "emulated_device",
    "saved_tensor_bytes",
]
