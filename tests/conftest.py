"""What every test gets: one thread, one seed, deterministic kernels, and the devices to run on."""

import os

# Read when CUDA starts, so it must be set before any test touches a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from geomlib.testing import emulated_device

DEVICES = ["cpu", "emulated", *([os.environ["TORCH_DEVICE"]] if os.environ.get("TORCH_DEVICE") else [])]


@pytest.fixture(autouse=True)
def _reproducible():
    """Make each test independent of those before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def emulated():
    """Return the emulated accelerator, for what only it can show: mixed devices and waits of the host."""
    try:
        return emulated_device()
    except RuntimeError as error:
        pytest.skip(f"no emulated device: {error}")


@pytest.fixture(params=DEVICES)
def device(request):
    """Return each device of this run: CPU, emulated accelerator, and ``TORCH_DEVICE`` if it is set."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return torch.device(request.param)


@pytest.fixture
def generator():
    """Return a seeded CPU generator."""
    return torch.Generator().manual_seed(0)
