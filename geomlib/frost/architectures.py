"""Ready models: small ones for vectors, sequences and images, and those of the paper's Table 3.

The paper (arXiv 2601.19551) gives no small models; those here are reconstructed, sized so that one trains
in under a minute on one core. All modes of one factory share stem and heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn

from geomlib.frost.baselines import BasicSSM, Recurrent, Vanilla
from geomlib.frost.certified import Certified, Parametrisation
from geomlib.frost.model import MODES, Frost
from geomlib.frost.stems import Patches, Pointwise, Tokens
from geomlib.frost.transitions import (
    AttentionBlock,
    Block,
    Bottleneck,
    Transition,
)
from geomlib.frost.unrolled import Unrolled

__all__ = ["KINDS", "Options", "image", "resnet50", "sequence", "vector", "vit_b16"]

KINDS = (*MODES, "vanilla", "recurrent", "basic_ssm")
"""Every value of `mode` that the factories take."""


class Options(TypedDict, total=False):
    """What every factory takes besides its sizes; see :class:`geomlib.frost.Frost` for the meaning.

    `hurst`, `scale`, `scale_parameter`, `learn_hurst` and `initial` concern the modes of `Frost` alone: the
    baselines ignore them, so that one call serves all modes.
    """

    hurst: float
    scale: float
    scale_parameter: Literal["exp", "sigmoid"] | None
    learn_hurst: bool
    initial: Literal["zeros", "stem"] | None
    readout_norm: bool
    supervise: Literal["last", "all"]
    detach_halt: bool
    checkpoint: bool
    generator: torch.Generator | None
    device: torch.device | str | None
    dtype: torch.dtype | None


_FROST_ONLY = ("hurst", "scale", "scale_parameter", "learn_hurst", "initial")


def vector(
    in_features: int,
    classes: int,
    *,
    width: int = 64,
    steps: int = 12,
    mode: str = "certified",
    kappa: float = 0.9,
    expansion: int = 2,
    activation: str = "relu",
    parametrisation: Parametrisation = "normalised",
    **options: Unpack[Options],
) -> Unrolled:
    """Build a model of vectors: `Linear`, layer norm and ReLU, then dense blocks.

    Parameters
    ----------
    in_features, classes : int
        Sizes of input and output.
    width : int
        Of the state.
    steps : int
        Of a forward pass.
    mode : str
        One of `KINDS`.
    kappa, activation, parametrisation
        Of the certified transition.
    expansion : int
        Hidden channels are `expansion * width`.
    **options
        See :class:`Options`.

    Returns
    -------
    Unrolled
        Takes `(N, in_features)`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Source: reconstructed; no readout norm unless asked for.

    Examples
    --------
    >>> model = vector(144, 10, generator=torch.Generator().manual_seed(0))
    >>> model(torch.zeros(5, 144)).logits.shape
    torch.Size([5, 12, 10])
    """
    where = _where(options)
    contract: dict[str, Any] = {"kappa": kappa, "activation": activation, "parametrisation": parametrisation}
    return _assemble(
        Pointwise(in_features, width, axes=0, norm=True, **where),
        lambda: Block(width, expansion=expansion, **where),
        lambda: Certified(width, hidden=(expansion * width,), **contract, **where),
        width,
        classes,
        mode,
        steps,
        {"axes": 0},
        options,
    )


def sequence(
    in_channels: int,
    classes: int,
    *,
    width: int = 24,
    steps: int = 12,
    kernel_size: int = 3,
    dilation: int = 1,
    read_position: int | None = 0,
    mode: str = "certified",
    kappa: float = 0.98,
    expansion: int = 2,
    activation: str = "relu",
    parametrisation: Parametrisation = "normalised",
    **options: Unpack[Options],
) -> Unrolled:
    """Build a model of sequences: a pointwise stem, then blocks of two convolutions.

    Parameters
    ----------
    in_channels, classes : int
        Sizes of input and output.
    width : int
        Channels of the state.
    steps : int
        Of a forward pass.
    kernel_size, dilation : int
        Of both convolutions: a step carries information `(kernel_size - 1) * dilation` places.
    read_position : int or None
        Where class and halting score are read, None for the mean of all places.
    mode : str
        One of `KINDS`.
    kappa, activation, parametrisation
        Of the certified transition.
    expansion : int
        Hidden channels are `expansion * width`.
    **options
        See :class:`Options`; `readout_norm` is on unless switched off.

    Returns
    -------
    Unrolled
        Takes `(N, in_channels, L)`, any `L`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Source: reconstructed.

    Examples
    --------
    >>> model = sequence(6, 4, mode="euler", generator=torch.Generator().manual_seed(0))
    >>> model(torch.zeros(5, 6, 24)).scores.shape
    torch.Size([5, 12])
    """
    where = _where(options)
    sizes: dict[str, Any] = {"axes": 1, "kernel_size": kernel_size, "dilation": dilation}
    contract: dict[str, Any] = {"kappa": kappa, "activation": activation, "parametrisation": parametrisation}
    return _assemble(
        Pointwise(in_channels, width, axes=1, norm=False, **where),
        lambda: Block(width, expansion=expansion, **sizes, **where),
        lambda: Certified(width, hidden=(expansion * width,), **contract, **sizes, **where),
        width,
        classes,
        mode,
        steps,
        {"axes": 1, "read_position": read_position, "readout_norm": True},
        options,
    )


def image(
    in_channels: int,
    classes: int,
    *,
    width: int = 32,
    patch: int = 4,
    steps: int = 8,
    kernel_size: int = 3,
    mode: str = "certified",
    kappa: float = 0.9,
    expansion: int = 2,
    activation: str = "relu",
    parametrisation: Parametrisation = "normalised",
    **options: Unpack[Options],
) -> Unrolled:
    """Build a model of images: patches, channel norm and ReLU, then blocks of two convolutions, mean read.

    Parameters
    ----------
    in_channels, classes : int
        Sizes of input and output.
    width : int
        Channels of the state.
    patch : int
        Side of the patches; what does not fill one is cut off.
    steps : int
        Of a forward pass.
    kernel_size : int
        Of both convolutions.
    mode : str
        One of `KINDS`.
    kappa, activation, parametrisation
        Of the certified transition.
    expansion : int
        Hidden channels are `expansion * width`.
    **options
        See :class:`Options`; `readout_norm` is on unless switched off.

    Returns
    -------
    Unrolled
        Takes `(N, in_channels, H, W)`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Source: reconstructed.

    Examples
    --------
    >>> model = image(1, 10, generator=torch.Generator().manual_seed(0))
    >>> model(torch.zeros(5, 1, 28, 28)).state.shape
    torch.Size([5, 32, 7, 7])
    """
    where = _where(options)
    sizes: dict[str, Any] = {"axes": 2, "kernel_size": kernel_size}
    contract: dict[str, Any] = {"kappa": kappa, "activation": activation, "parametrisation": parametrisation}
    return _assemble(
        Patches(in_channels, width, patch, stride=patch, **where),
        lambda: Block(width, expansion=expansion, **sizes, **where),
        lambda: Certified(width, hidden=(expansion * width,), **contract, **sizes, **where),
        width,
        classes,
        mode,
        steps,
        {"axes": 2, "readout_norm": True},
        options,
    )


def resnet50(
    classes: int, *, steps: int = 16, mode: str = "euler", kappa: float = 0.9, **options: Unpack[Options]
) -> Unrolled:
    """Build the paper's convolutional model: a bottleneck 256-64-64-256 on maps a quarter of the image.

    Parameters
    ----------
    classes : int
        Number of classes.
    steps : int
        Of a forward pass.
    mode : str
        One of `KINDS`; the certified transition has the same weights in place of the bottleneck's.
    kappa : float
        Of the certified transition.
    **options
        See :class:`Options`; `readout_norm` is on unless switched off.

    Returns
    -------
    Unrolled
        Takes `(N, 3, H, W)`, in the paper 224 by 224.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Source: section 6, Appendix C and Table 3, which does not say how the parameters are made up. One
    bottleneck has 69 632 weights, and with a 7 by 7 convolution of the image to 256 channels the tied model
    agrees with the 0.11 M of the table. Sixteen of them make 1.17 M against the printed 1.24 M, and three
    linear maps of 256 channels bring 0.20 M where the table's state-space models have 1.38 M more: neither
    surplus is described, and neither is reproduced. The stem's stride of 4 stands for its pooling, which
    the paper replaces by a dilated convolution.

    Examples
    --------
    >>> model = resnet50(10, mode="recurrent", steps=2)
    >>> model(torch.zeros(1, 3, 32, 32)).state.shape
    torch.Size([1, 256, 8, 8])
    """
    where = _where(options)
    return _assemble(
        Patches(3, 256, 7, stride=4, **where),
        lambda: Bottleneck(256, 64, **where),
        lambda: Certified(256, axes=2, hidden=(64, 64), kernel_size=(1, 3, 1), kappa=kappa, **where),
        256,
        classes,
        mode,
        steps,
        {"axes": 2, "readout_norm": True},
        options,
    )


def vit_b16(
    classes: int,
    *,
    steps: int = 12,
    size: int = 224,
    mode: str = "euler",
    **options: Unpack[Options],
) -> Unrolled:
    """Build the paper's transformer: a ViT-B block on 16 by 16 patches and a class token, which is read.

    Parameters
    ----------
    classes : int
        Number of classes.
    steps : int
        Of a forward pass.
    size : int
        Side of the images, a multiple of 16.
    mode : str
        One of `KINDS` but `"certified"`: attention has no global Lipschitz constant.
    **options
        See :class:`Options`; `readout_norm` is on unless switched off.

    Returns
    -------
    Unrolled
        Takes `(N, 3, size, size)`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Source: section 6 and Table 3. Without classifier and halting head the untied model has 85 798 656
    parameters and the tied one 7 832 064, as the table prints them: 85.80 M and 7.83 M. The state-space maps
    bring 3 * 768^2 = 1.77 M where the table's models have 12.98 M more; that surplus is not described and not
    reproduced.

    Examples
    --------
    >>> model = vit_b16(10, mode="recurrent", steps=1, size=32)
    >>> model(torch.zeros(1, 3, 32, 32)).state.shape
    torch.Size([1, 768, 5])
    """
    where = _where(options)
    return _assemble(
        Tokens(768, 16, size, **where),
        lambda: AttentionBlock(768, 12, **where),
        None,
        768,
        classes,
        mode,
        steps,
        {"axes": 1, "read_position": 0, "readout_norm": True},
        options,
    )


def _assemble(
    stem: nn.Module,
    free: Callable[[], Transition],
    certified: Callable[[], Transition] | None,
    width: int,
    classes: int,
    mode: str,
    steps: int,
    fixed: dict[str, Any],
    options: Options,
) -> Unrolled:
    """Put stem and blocks into the model that `mode` names."""
    if mode not in KINDS:
        raise ValueError(f"mode must be one of {KINDS}, got {mode!r}: no such model")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: there would be nothing to read")
    chosen: dict[str, Any] = {**fixed, **options}
    if mode in MODES:
        if mode != "certified":
            block = free()
        elif certified is None:
            raise ValueError(f"mode must not be {mode!r} here: attention has no global Lipschitz constant")
        else:
            block = certified()
        return Frost(stem, block, width, classes, steps=steps, mode=mode, **chosen)
    for name in _FROST_ONLY:
        chosen.pop(name, None)
    if mode == "vanilla":
        return Vanilla(stem, [free() for _ in range(steps)], width, classes, **chosen)
    tied = Recurrent if mode == "recurrent" else BasicSSM
    return tied(stem, free(), width, classes, steps=steps, **chosen)


def _where(options: Options) -> dict[str, Any]:
    return {name: options.get(name) for name in ("generator", "device", "dtype")}
