"""Where data sets come from: packages, folders on this machine, and the network last.

Files that are downloaded are checked by torchvision's checksums, written to a folder beside the cache and
renamed into it, under a lock: two processes that start together download once, and an interrupted download
leaves nothing behind.
"""

from __future__ import annotations

import gzip
import math
import os
import random
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from geomlib.lab.sampling import stratified

if TYPE_CHECKING:
    import torchvision

__all__ = ["NAMES", "Arrays", "Images", "arrays", "cache_folder", "image_folder"]

NAMES = ("digits", "mnist1d", "fashion_mnist", "cifar10", "cifar100", "image_folder")

DEBIAN = Path("/usr/share/datasets")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}


@dataclass(frozen=True)
class Arrays:
    """A data set as it comes: ``x`` of shape ``(n, channels, ...)``, ``y`` of shape ``(n,)``, int64.

    Examples
    --------
    >>> from geomlib.lab import sources
    >>> sources.arrays("digits").train_x.shape
    torch.Size([1437, 1, 8, 8])
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Images:
    """Image files and their labels.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab.sources import Images
    >>> Images((), torch.empty(0, dtype=torch.int64)).paths
    ()
    """

    paths: tuple[Path, ...]
    y: Tensor

    def select(self, index: Tensor) -> Images:
        """Return the files at ``index``, of shape ``(k,)``."""
        return Images(tuple(self.paths[i] for i in index.tolist()), self.y[index])

    def read(self, index: Tensor, size: int) -> Tensor:
        """Return pictures of shape ``(k, 3, size, size)`` in 0..1: scaled to the shorter side and cropped."""
        from PIL import Image, ImageOps

        pictures = []
        for i in index.tolist():
            with Image.open(self.paths[i]) as file:
                square = ImageOps.fit(file.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
            pictures.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        return torch.stack(pictures).float() / 255


def arrays(name: str, *, root: str | Path | None = None, download: bool = True) -> Arrays:
    """Return a data set that fits in memory, from the first place that has it.

    Raises
    ------
    FileNotFoundError
        If no place has it and it cannot be downloaded.
    ValueError
        If the name is not one of ``digits``, ``mnist1d``, ``fashion_mnist``, ``cifar10`` and ``cifar100``.

    Examples
    --------
    >>> from geomlib.lab import sources
    >>> sources.arrays("digits").classes[:3]
    ('0', '1', '2')
    """
    made_here: Mapping[str, Callable[[], Arrays]] = {"digits": _digits, "mnist1d": _mnist1d}
    if name in made_here:
        return made_here[name]()
    if name not in _FILES:
        raise ValueError(f"name must be one of {', '.join([*made_here, *_FILES])}, got {name!r}")
    files = _FILES[name]
    for folder in _places(root):
        if (found := files.read(folder)) is not None:
            return found
    reason = "download=False forbids the network"
    if download:
        try:
            return _download(files)
        # Whatever stops a download (no network, no room, a wrong checksum), the ways out are the same.
        except (OSError, RuntimeError) as error:
            reason = f"the download failed: {error}"
    raise FileNotFoundError(_advice(name, files, reason))


def cache_folder() -> Path:
    """Return the user's cache: ``$XDG_CACHE_HOME/geomlib``, or what the platform uses.

    Examples
    --------
    >>> from geomlib.lab import sources
    >>> sources.cache_folder().name
    'geomlib'
    """
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "geomlib"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "geomlib"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "geomlib"
    return Path.home() / ".cache" / "geomlib"


def image_folder(root: str | Path) -> tuple[Images, Images, tuple[str, ...]]:
    """Find image files sorted by class: ``root/train/<class>/*`` and ``root/val/<class>/*``.

    ``test`` will do for ``val``; without either, a fifth of ``root/<class>/*`` is set apart, the same files
    every time.

    Returns
    -------
    train, test : Images
    classes : tuple of str

    Raises
    ------
    FileNotFoundError
        If there are no pictures.
    ValueError
        If training and test have different classes.

    Examples
    --------
    >>> from geomlib.lab import sources
    >>> sources.image_folder("no/such/folder")
    Traceback (most recent call last):
        ...
    FileNotFoundError: no pictures below no/such/folder: put them into one folder per class, ...
    """
    root = Path(root)
    parts = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if parts and (root / "train").is_dir():
        train, classes = _by_class(root / "train")
        test, others = _by_class(parts[0])
        if classes != others:
            raise ValueError(
                f"{parts[0]} must have the classes of {root / 'train'}, got {others}, not {classes}"
            )
        return train, test, classes
    every, classes = _by_class(root)
    aside = stratified(every.y, max(len(classes), len(every.y) // 5), seed=0)
    rest = torch.ones(len(every.y), dtype=torch.bool)
    rest[aside] = False
    return every.select(rest.nonzero().flatten()), every.select(aside), classes


def _by_class(folder: Path) -> tuple[Images, tuple[str, ...]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/*")):
        if path.suffix.lower() in SUFFIXES:
            found.setdefault(path.parent.name, []).append(path)
    if not found:
        raise FileNotFoundError(
            f"no pictures below {folder}: put them into one folder per class, such as "
            f"{folder / 'cat' / '1.jpg'}"
        )
    labels = [label for label, paths in enumerate(found.values()) for _ in paths]
    return Images(tuple(path for paths in found.values() for path in paths), torch.tensor(labels)), tuple(
        found
    )


# Made on this machine


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.from_numpy(raw.images).float().unsqueeze(1)
    y = torch.from_numpy(raw.target).long()
    # The package has no split of its own: a fifth is set apart, the same for everybody.
    aside = stratified(y, 360, seed=0).sort().values
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[aside] = False
    return Arrays(x[rest], y[rest], x[aside], y[aside], tuple(str(digit) for digit in range(10)))


def _mnist1d() -> Arrays:
    # The package seeds the global generators; whoever calls us must not notice.
    with _global_randomness_kept():
        from mnist1d.data import get_dataset_args, make_dataset

        raw = make_dataset(get_dataset_args())
    return Arrays(
        train_x=torch.from_numpy(raw["x"]).float().unsqueeze(1),
        train_y=torch.from_numpy(raw["y"]).long(),
        test_x=torch.from_numpy(raw["x_test"]).float().unsqueeze(1),
        test_y=torch.from_numpy(raw["y_test"]).long(),
        classes=tuple(str(digit) for digit in range(10)),
    )


@contextmanager
def _global_randomness_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


# Read from files


@dataclass(frozen=True)
class _Files:
    """A data set in files: how to read it from a folder (``None`` if it is not there) and to download it."""

    folder: str
    read: Callable[[Path], Arrays | None]
    fetch: Callable[[Path], object]
    by_hand: str


def _fashion_mnist(place: Path) -> Arrays | None:
    names = [
        f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    # As torchvision lays it out, as Debian does, and as somebody may have put it.
    for folder in (place / "FashionMNIST" / "raw", place / "fashion-mnist", place):
        paths = [next((p for p in (folder / n, folder / f"{n}.gz") if p.is_file()), None) for n in names]
        if all(paths):
            train_x, train_y, test_x, test_y = (_idx(path) for path in paths if path is not None)
            return Arrays(train_x.unsqueeze(1), train_y.long(), test_x.unsqueeze(1), test_y.long(), _CLOTHES)
    return None


def _idx(path: Path) -> Tensor:
    """Read an IDX file of bytes: two zeros, type 8, the number of axes, their lengths, the data."""
    damaged = OSError(f"{path} is damaged: delete it and load again")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise damaged from error
    axes = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", content[4:start]) if len(content) >= start else ()
    if not shape or len(content) - start != math.prod(shape):
        raise damaged
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _cifar(kind: str) -> type[torchvision.datasets.CIFAR10]:
    from torchvision import datasets

    return {"CIFAR10": datasets.CIFAR10, "CIFAR100": datasets.CIFAR100}[kind]


def _read_cifar(kind: str, place: Path) -> Arrays | None:
    source = _cifar(kind)
    if not (place / source.base_folder).is_dir():
        return None
    try:
        # torchvision compares each file with its checksum before it reads it.
        train, test = (source(place, train=part) for part in (True, False))
    except RuntimeError as error:
        raise OSError(f"{place / source.base_folder} is damaged: delete it and load again") from error
    return Arrays(
        train_x=torch.from_numpy(train.data).permute(0, 3, 1, 2),
        train_y=torch.tensor(train.targets),
        test_x=torch.from_numpy(test.data).permute(0, 3, 1, 2),
        test_y=torch.tensor(test.targets),
        classes=tuple(train.classes),
    )


def _fetch_cifar(kind: str, folder: Path) -> None:
    _cifar(kind)(folder, download=True)


def _fetch_fashion_mnist(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST

    FashionMNIST(folder, download=True)


_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_FILES = {
    "fashion_mnist": _Files(
        "FashionMNIST",
        _fashion_mnist,
        _fetch_fashion_mnist,
        "On Debian and Ubuntu: apt install dataset-fashion-mnist.",
    ),
    "cifar10": _Files(
        "cifar-10-batches-py",
        partial(_read_cifar, "CIFAR10"),
        partial(_fetch_cifar, "CIFAR10"),
        "Unpack cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html into that cache.",
    ),
    "cifar100": _Files(
        "cifar-100-python",
        partial(_read_cifar, "CIFAR100"),
        partial(_fetch_cifar, "CIFAR100"),
        "Unpack cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html into that cache.",
    ),
}


def _places(root: str | Path | None) -> Iterator[Path]:
    if root is not None:
        yield Path(root).expanduser()
    if named := os.environ.get("GEOMLIB_DATA"):
        yield Path(named).expanduser()
    yield cache_folder()
    yield DEBIAN


def _download(files: _Files) -> Arrays:
    # torch itself needs this package, so it is always there.
    from filelock import FileLock

    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{files.folder}.lock"):
        # Another process may have been faster while this one waited.
        if (found := files.read(cache)) is None:
            with tempfile.TemporaryDirectory(dir=cache, prefix="incomplete-") as workshop:
                files.fetch(Path(workshop))
                shutil.rmtree(cache / files.folder, ignore_errors=True)
                os.replace(Path(workshop) / files.folder, cache / files.folder)
            found = files.read(cache)
    if found is None:
        raise RuntimeError(f"{cache / files.folder} is incomplete after the download")
    return found


def _advice(name: str, files: _Files, reason: str) -> str:
    searched = ", ".join(str(place) for place in _places(None))
    return (
        f"{name} is not on this machine (searched {searched}) and {reason}. Three ways to get it:\n"
        f"  1. Load it once with a network; it is kept in {cache_folder()}.\n"
        f"  2. Copy a folder that holds {files.folder} from another machine and name it by root= or by the "
        "environment variable GEOMLIB_DATA.\n"
        f"  3. {files.by_hand}"
    )
