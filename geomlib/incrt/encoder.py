r"""The self-organising encoder: layers of growing attention and a dictionary of prototypes.

A layer is `X' = X + Attention(LN X)`, `X'' = X' + DDCL(LN X')`, with layer norms without gain and bias (block
diagram of arXiv 2604.01880 reconstructed from its abstract): with a learned gain the encoder could shrink its
tokens to a point.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomlib.incrt.attention import DirectionalAttention, Extent
from geomlib.incrt.layer import EncoderLayer, EncoderOutput, fill, norm, perceptron, sinusoids
from geomlib.incrt.prototypes import DDCLBlock

__all__ = ["SelfOrganisingEncoder", "compact"]

Loss = Callable[[Any, Tensor], Tensor]


class SelfOrganisingEncoder(nn.Module):
    r"""A pre-norm encoder whose heads grow and whose feed-forward blocks are dictionaries.

    Parameters
    ----------
    in_features, vocabulary : int
        Width of real inputs, or number of tokens; exactly one of them.
    d, dk, dv : int
        Width, and sizes of a head.
    max_heads : int
        Slots for heads in each layer.
    prototypes : int
        Size of each dictionary; with `ffn="mlp"` not used.
    layers : int
        How many work at the start.
    max_layers : int, optional
        How many are allocated; `deepen` sets the next one to work. As many as `layers` by default. While any
        wait, `DistributedDataParallel` needs `find_unused_parameters=True`: they have no gradient.
    outputs : int or (int, int)
        Classes, or readouts and classes of each.
    heads : int
        Heads of each layer at the start.
    ffn : {"ddcl", "mlp"}
        A dictionary, or a perceptron with one hidden layer.
    hidden : int, optional
        Its hidden units, `4 d` by default.
    pool : {None, "mean"}
        Read every token, or their mean.
    causal, aggregate, slots
        See `DirectionalAttention`.
    affine : bool
        Gain and bias in the layer norms.
    positions : {"sinusoidal", None}
        Added to the embedded inputs.
    dictionary : mapping, optional
        Further arguments of `DDCLBlock`, such as `out`, `mode`, `stop_grad`, `temperature`.
    generator : torch.Generator, optional
        Draws the initial weights.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Source: arXiv 2604.01880 by its abstract; everything else is reconstructed. Head and layer counts live in
    buffers, so that a state dict restores the structure.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> model = SelfOrganisingEncoder(
    ...     vocabulary=5, d=16, dk=8, dv=4, max_heads=4, prototypes=8, outputs=(2, 5), generator=generator
    ... )
    >>> output = model(torch.zeros(3, 12, dtype=torch.int64))
    >>> output.logits.shape, model.heads
    (torch.Size([3, 12, 2, 5]), [1])
    """

    active_layers: Tensor

    def __init__(
        self,
        *,
        in_features: int | None = None,
        vocabulary: int | None = None,
        d: int,
        dk: int,
        dv: int,
        max_heads: int,
        prototypes: int = 16,
        layers: int = 1,
        max_layers: int | None = None,
        outputs: int | tuple[int, int],
        heads: int = 1,
        ffn: Literal["ddcl", "mlp"] = "ddcl",
        hidden: int | None = None,
        pool: Literal["mean"] | None = None,
        causal: bool = False,
        aggregate: Literal["sum", "mean"] = "sum",
        slots: Literal["prefix", "mask"] = "prefix",
        affine: bool = False,
        positions: Literal["sinusoidal"] | None = "sinusoidal",
        dictionary: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        max_layers = layers if max_layers is None else max_layers
        _check(in_features, vocabulary, layers, max_layers, outputs, ffn, pool, positions)
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d, self.pool, self.positions, self.ffn = d, pool, positions, ffn
        self.embedding: nn.Module
        if vocabulary is not None:
            self.embedding = nn.Embedding(vocabulary, d, **where)
            self.in_features, scale = None, 1.0
        else:
            assert in_features is not None
            self.embedding = nn.Linear(in_features, d, **where)
            self.in_features, scale = in_features, in_features**-0.5
        fill(self.embedding, scale, generator)

        def layer() -> EncoderLayer:
            attention = DirectionalAttention(
                d, dk, dv, max_heads,
                heads=heads, causal=causal, aggregate=aggregate, slots=slots, generator=generator, **where,
            )  # fmt: skip
            block: nn.Module
            if ffn == "ddcl":
                # Copied, since every layer has a temperature of its own.
                options = copy.deepcopy(dict(dictionary or {}))
                block = DDCLBlock(d, prototypes, generator=generator, **options, **where)
            else:
                block = perceptron(d, 4 * d if hidden is None else hidden, generator, where)
            return EncoderLayer(attention, block, affine=affine, **where)

        self.layers = nn.ModuleList(layer() for _ in range(max_layers))
        self._extent = Extent(layers)
        self.norm = norm(d, affine, where)
        self.outputs = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        self.readout = nn.Linear(d, torch.Size(self.outputs).numel(), **where)
        fill(self.readout, d**-0.5, generator)
        self.register_buffer("active_layers", torch.full((), layers, device=device))
        self.register_load_state_dict_post_hook(_read_extent)

    @property
    def depth(self) -> int:
        """The number of layers that work."""
        return self._extent.active

    @property
    def heads(self) -> list[int]:
        """Active heads of each working layer."""
        return [layer.attention.active for layer in self.active()]

    def active(self) -> list[EncoderLayer]:
        """Return the layers that work."""
        # A slice of a module list is a new module, which costs more than all that is asked of it each step.
        return self.allocated()[: self._extent.active]

    def allocated(self) -> list[EncoderLayer]:
        """Return all layers, those that wait included."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> EncoderOutput:
        """Encode and read out.

        Parameters
        ----------
        x : Tensor
            `(B, n)` int64 tokens, or `(B, n, in_features)`.
        mask : Tensor, optional
            `(B, n)` bool, True for tokens and False for padding.

        Returns
        -------
        EncoderOutput

        Raises
        ------
        ValueError
            If the shapes do not fit.
        """
        stream = self.embed(x)
        found = []
        for layer in self.active():
            stream, quantised = layer(stream, mask)
            if quantised is not None:
                found.append(quantised)
        stream = self.norm(stream)
        if self.pool == "mean":
            stream = stream.mean(1) if mask is None else _masked_mean(stream, mask)
        logits = self.readout(stream).unflatten(-1, self.outputs)
        return EncoderOutput(logits, tuple(found))

    def embed(self, x: Tensor) -> Tensor:
        """Return the stream before the first layer, `(B, n, d)`."""
        wanted = 2 if self.in_features is None else 3
        if x.dim() != wanted or (wanted == 3 and x.shape[-1] != self.in_features):
            shape = "(B, n)" if wanted == 2 else f"(B, n, {self.in_features})"
            raise ValueError(f"x must be {shape}, got {tuple(x.shape)}: the embedding takes no other")
        stream: Tensor = self.embedding(x)
        return stream + sinusoids(stream) if self.positions else stream

    def structure_loss(self, beta: float = 1.0, task: Loss | None = None) -> Loss:
        """Return the loss of a step: the task plus the quantisation losses times `beta / d`.

        Parameters
        ----------
        beta : float
            Weight of the dictionaries, not negative.
        task : callable, optional
            `task(logits, y)`; cross-entropy over all but the last axis by default, which leaves out targets
            of -100.

        Returns
        -------
        callable
            Takes an `EncoderOutput` and targets.

        Raises
        ------
        ValueError
            If `beta` is negative.
        """
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}: prototypes would flee the tokens")
        measure = _cross_entropy if task is None else task

        def loss(output: EncoderOutput, y: Tensor) -> Tensor:
            value = measure(output.logits, y)
            for quantised in output.quantisation:
                value = value + beta / self.d * quantised.loss
            return value

        return loss

    @torch.no_grad()
    def initialise_prototypes(
        self, x: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        """Set the prototypes of every working layer to tokens that it sees, as drawn from a batch.

        Far from the tokens a prototype has no weight and dies, so that this belongs to the first steps.

        Parameters
        ----------
        x, mask
            As in `forward`.
        generator : torch.Generator, optional
            Draws the tokens.
        """
        training, stream = self.training, self.embed(x)
        self.eval()  # lest the temperatures move
        for layer in self.active():
            if isinstance(layer.feed_forward, DDCLBlock):
                tokens = layer.norm_feed_forward(stream + layer.attention(layer.norm_attention(stream), mask))
                tokens = tokens.flatten(0, 1) if mask is None else tokens[mask]
                layer.feed_forward.initialise_from(tokens, generator=generator)
            stream, _ = layer(stream, mask)
        self.train(training)

    @torch.no_grad()
    def deepen(self) -> int:
        """Let the next allocated layer work; it adds nothing yet, so that the function stays as it was.

        Returns
        -------
        int
            Its index.

        Raises
        ------
        ValueError
            If all allocated layers work.

        Notes
        -----
        Source: growth in depth is named in arXiv 2604.10703; zero outputs of the new layer are reconstructed.
        """
        index = self.depth
        if index == len(self.layers):
            raise ValueError(f"max_layers must exceed the {index} working layers to deepen: none is left")
        layer = self.layers[index]
        assert isinstance(layer, EncoderLayer)
        layer.attention.W_out.zero_()
        last = layer.feed_forward
        for name, parameter in last.named_parameters():
            if name in ("weight", "values", "2.weight", "2.bias"):
                parameter.zero_()
        self._extent.set(index + 1)
        self.active_layers.fill_(index + 1)
        return index

    def compact(self) -> SelfOrganisingEncoder:
        """Return a copy for inference that holds working layers and active heads only."""
        return compact(self)


@torch.no_grad()
def compact(model: SelfOrganisingEncoder) -> SelfOrganisingEncoder:
    """Copy an encoder without empty slots, idle layers and what growth remembers, in evaluation mode.

    Parameters
    ----------
    model : SelfOrganisingEncoder
        Stays as it is.

    Returns
    -------
    SelfOrganisingEncoder
        The same function up to rounding.

    Examples
    --------
    >>> model = SelfOrganisingEncoder(
    ...     vocabulary=5,
    ...     d=16,
    ...     dk=8,
    ...     dv=4,
    ...     max_heads=4,
    ...     prototypes=8,
    ...     outputs=5,
    ...     generator=torch.Generator().manual_seed(0),
    ... )
    >>> compact(model).layers[0].attention.W_in.shape
    torch.Size([1, 20, 16])
    """
    small = copy.deepcopy(model)
    small.layers = small.layers[: small.depth]
    if hasattr(small, "structure"):
        del small.structure
    for layer in small.active():
        attention = layer.attention
        heads = attention.active
        attention.max_heads = heads
        for name in ("W_in", "W_out"):
            setattr(attention, name, nn.Parameter(getattr(attention, name)[:heads].clone()))
        attention.births = attention.births[:heads].clone()
        attention.recording = layer.keep_tokens = False
        attention.recorded.clear()
        if hasattr(layer, "growth"):
            del layer.growth
    return small.eval()


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def _masked_mean(stream: Tensor, mask: Tensor) -> Tensor:
    return (stream * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def _read_extent(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, SelfOrganisingEncoder)
    module._extent.set(int(module.active_layers))


def _check(
    in_features: int | None,
    vocabulary: int | None,
    layers: int,
    max_layers: int,
    outputs: int | Sequence[int],
    ffn: str,
    pool: str | None,
    positions: str | None,
) -> None:
    if (in_features is None) == (vocabulary is None):
        raise ValueError("exactly one of in_features and vocabulary must be given: inputs are real or tokens")
    for name, value in (("in_features", in_features), ("vocabulary", vocabulary), ("layers", layers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: there would be nothing to encode")
    if max_layers < layers:
        raise ValueError(f"max_layers must be at least the {layers} layers, got {max_layers}: they need room")
    sizes = (outputs,) if isinstance(outputs, int) else tuple(outputs)
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError(
            f"outputs must be classes or (readouts, classes), got {outputs}: nothing else is read"
        )
    if ffn not in ("ddcl", "mlp"):
        raise ValueError(f"ffn must be 'ddcl' or 'mlp', got {ffn!r}: no such block")
    if pool not in (None, "mean"):
        raise ValueError(f"pool must be None or 'mean', got {pool!r}: tokens are read one by one or averaged")
    if positions not in (None, "sinusoidal"):
        raise ValueError(f"positions must be None or 'sinusoidal', got {positions!r}: no such code of places")
