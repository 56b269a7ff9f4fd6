"""Data sets, all behind one interface: tensors for training and test, a shape, and the names of the classes.

Real but small by default: handwritten digits, one-dimensional digits and clothes run without a network.
Inputs are standardised with the statistics of the training samples; a subset is drawn class by class, so
that every class keeps its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
from torch import Tensor

from geomlib.lab.sampling import stratified

if TYPE_CHECKING:
    from geomlib.lab.sources import Images

__all__ = ["Dataset", "ImageSplit", "Samples", "Split", "load"]


@dataclass(frozen=True, repr=False)
class Split:
    """Samples held in memory.

    Attributes
    ----------
    x : Tensor
        Shape ``(n, ...)``, float32.
    y : Tensor
        Shape ``(n, ...)``; int64 class labels of shape ``(n,)`` in the data sets of this module.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab.data import Split
    >>> split = Split(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    >>> split[torch.tensor([0, 3])][1]
    tensor([0, 1])
    """

    x: Tensor
    y: Tensor
    workers: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(
                f"y must have one label per sample, got {len(self.y)} labels for {len(self.x)} samples"
            )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __repr__(self) -> str:
        return f"Split(x {tuple(self.x.shape)} {self.x.dtype}, y {tuple(self.y.shape)} {self.y.dtype})"

    def to(self, device: torch.device | str) -> Split:
        """Return the samples on another device.

        Examples
        --------
        >>> import torch
        >>> from geomlib.lab.data import Split
        >>> Split(torch.zeros(1, 2), torch.tensor([0])).to("meta").x.device
        device(type='meta')
        """
        return Split(self.x.to(device), self.y.to(device))


class ImageSplit:
    """Samples read from image files when they are asked for.

    Parameters
    ----------
    images : Images
        Paths and labels.
    size : int
        Side of the square that each picture is scaled and cropped to.
    mean, std : Tensor
        Shape ``(3,)``: statistics of the training samples.

    Attributes
    ----------
    workers : int
        How many processes should read ahead.

    Examples
    --------
    >>> import torch
    >>> from geomlib.lab.data import ImageSplit
    >>> from geomlib.lab.sources import Images
    >>> len(ImageSplit(Images((), torch.empty(0, dtype=torch.int64)), 8, torch.zeros(3), torch.ones(3)))
    0
    """

    def __init__(self, images: Images, size: int, mean: Tensor, std: Tensor) -> None:
        self.images = images
        self.y = images.y
        self.size = size
        self.mean = mean
        self.std = std
        # Starting processes takes seconds; a few thousand pictures are read sooner without them.
        self.workers = 8 if len(images.y) > 5000 else 0

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        pictures = self.images.read(index, self.size)  # (batch, 3, size, size)
        return _standardise(pictures, self.mean, self.std), self.y[index]

    def __repr__(self) -> str:
        return f"ImageSplit({len(self)} files as (3, {self.size}, {self.size}))"


Samples: TypeAlias = Split | ImageSplit
"""What a model is trained on: a length, labels ``y``, and ``samples[index]`` for an index ``(batch,)``."""


@dataclass(frozen=True, repr=False)
class Dataset:
    """A data set, ready to train on.

    Attributes
    ----------
    name : str
        As given to :func:`load`.
    train, test : Samples
        :class:`Split`, or :class:`ImageSplit` for an image folder.
    shape : tuple of int
        Shape of one input.
    classes : tuple of str
        Names, in the order of the labels.
    mean, std : Tensor
        Shape ``(channels,)``: the statistics of the training samples that the inputs were standardised with.

    Examples
    --------
    >>> from geomlib.lab import data
    >>> digits = data.load("digits", train_size=100)
    >>> digits.num_classes, digits.shape, digits.train
    (10, (1, 8, 8), Split(x (100, 1, 8, 8) torch.float32, y (100,) torch.int64))
    """

    name: str
    train: Samples
    test: Samples
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def describe(self) -> str:
        """Return sizes, shape and classes in one sentence.

        Examples
        --------
        >>> from geomlib.lab import data
        >>> data.load("digits", train_size=100).describe()
        'digits: 100 training and 360 test samples of shape (1, 8, 8), 10 classes (0, 1, 2, ..., 9)'
        """
        shown = ", ".join(self.classes if self.num_classes <= 12 else (*self.classes[:10], "..."))
        return (
            f"{self.name}: {len(self.train)} training and {len(self.test)} test samples of shape "
            f"{self.shape}, {self.num_classes} classes ({shown})"
        )

    def __repr__(self) -> str:
        return f"Dataset({self.describe()})"


def load(
    name: str,
    *,
    root: str | Path | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    download: bool = True,
    flatten: bool = False,
    image_size: int = 64,
) -> Dataset:
    """Load a data set by name.

    Files are looked for in ``root``, in the folder that ``GEOMLIB_DATA`` names, in the user's cache and in
    ``/usr/share/datasets``, where Debian puts them; only then are they downloaded, checked, to the cache.

    Parameters
    ----------
    name : str
        ``"digits"`` (1797 pictures of 8 x 8, no network), ``"mnist1d"`` (5000 series of length 40, no
        network), ``"fashion_mnist"`` (70000 of 28 x 28), ``"cifar10"`` and ``"cifar100"`` (60000 of
        3 x 32 x 32) or ``"image_folder"`` (files sorted by class under ``root``).
    root : str or Path, optional
        Searched first; the folder itself for ``"image_folder"``.
    train_size, test_size : int, optional
        Draw so many samples, each class in proportion; all of them by default.
    seed : int
        Decides which samples are drawn. The split into training and test is the same for every seed.
    download : bool
        Whether the network may be asked.
    flatten : bool
        Give every input the shape ``(features,)``.
    image_size : int
        Side of the pictures of an image folder.

    Returns
    -------
    Dataset
        Inputs are float32 of shape ``(n, channels, ...)``, or ``(n, features)`` if flat, labels int64.

    Raises
    ------
    ValueError
        If the name is unknown, or more samples are asked for than there are.
    FileNotFoundError
        If the files are nowhere and cannot be downloaded; it lists the ways to get them.

    Examples
    --------
    >>> from geomlib.lab import data
    >>> data.load("digits", flatten=True).train.x.shape
    torch.Size([1437, 64])
    """
    from geomlib.lab import sources

    if name not in sources.NAMES:
        raise ValueError(
            f"name must be one of {', '.join(sources.NAMES)}, got {name!r}: nothing is known of it"
        )
    if name == "image_folder":
        if flatten:
            raise ValueError("flatten must be False for an image_folder, whose pictures are read one by one")
        return _image_folder(root, train_size, test_size, seed, image_size)
    raw = sources.arrays(name, root=root, download=download)
    chosen = stratified(raw.train_y, train_size, seed=seed, argument="train_size")
    kept = stratified(raw.test_y, test_size, seed=seed, argument="test_size")
    train, test = raw.train_x[chosen].float(), raw.test_x[kept].float()
    mean, std = _statistics(train)
    train, test = _standardise(train, mean, std), _standardise(test, mean, std)
    if flatten:
        train, test = train.flatten(1), test.flatten(1)
    return Dataset(
        name=name,
        train=Split(train, raw.train_y[chosen]),
        test=Split(test, raw.test_y[kept]),
        shape=tuple(train.shape[1:]),
        classes=raw.classes,
        mean=mean,
        std=std,
    )


def _image_folder(
    root: str | Path | None, train_size: int | None, test_size: int | None, seed: int, image_size: int
) -> Dataset:
    from geomlib.lab import sources

    if root is None:
        raise ValueError("root must name the folder of an image_folder, got None: there is nothing to read")
    train, test, classes = sources.image_folder(root)
    train = train.select(stratified(train.y, train_size, seed=seed, argument="train_size"))
    test = test.select(stratified(test.y, test_size, seed=seed, argument="test_size"))
    # A few hundred pictures fix a mean to two digits, and reading all of them would take minutes.
    sample = stratified(train.y, min(512, len(train.y)), seed=0)
    mean, std = _statistics(train.read(sample, image_size))
    return Dataset(
        name="image_folder",
        train=ImageSplit(train, image_size, mean, std),
        test=ImageSplit(test, image_size, mean, std),
        shape=(3, image_size, image_size),
        classes=classes,
        mean=mean,
        std=std,
    )


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of ``(n, channels, ...)``."""
    channels = x.transpose(0, 1).flatten(1)
    mean, std = channels.mean(dim=1), channels.std(dim=1, correction=0)
    # A constant channel has a deviation of rounding size; divided by it, rounding would become data.
    constant = std <= 1e-5 * mean.abs()
    return mean, std.masked_fill(constant, 1.0)


def _standardise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    return (x - mean.reshape(shape)) / std.reshape(shape)
