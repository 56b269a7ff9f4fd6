r"""DDCL-INCRT: an encoder that derives its own structure (Cirrincione, arXiv 2604.01880 and companions).

Prototypes take the place of the feed-forward block (`DDCLBlock`), heads of attention are born while the loss
asks for directed information and go when they add nothing (`SelfOrganisingEncoder`, `GrowthController`). The
operator that counts them, its gate and its motors are here as well, for theory and for training.
"""

from geomlib.incrt.attention import DirectionalAttention
from geomlib.incrt.controller import GrowthController
from geomlib.incrt.counts import (
    Greedy,
    HeadCount,
    Planted,
    greedy_directions,
    head_count_bounds,
    planted_operator,
)
from geomlib.incrt.dictionary import (
    Separation,
    Splits,
    between_scatter,
    close_pairs,
    covariance,
    draw_tokens,
    effective_rank,
    perplexity,
    separation,
    splits,
    used_codes,
)
from geomlib.incrt.encoder import SelfOrganisingEncoder, compact
from geomlib.incrt.energy import (
    concentration,
    critical_temperature,
    free_energy,
    growth_rate,
    implicit_force,
    rival_weights,
)
from geomlib.incrt.events import Event, Reading
from geomlib.incrt.gate import Gate
from geomlib.incrt.growth import GrowthConfig
from geomlib.incrt.homeostasis import Homeostasis, StructuralEvent, homeostasis
from geomlib.incrt.layer import EncoderLayer, EncoderOutput
from geomlib.incrt.motor import GradientMotor, HeadsMotor, MotorStatistics, TaskMotor, motor_statistics
from geomlib.incrt.operator import (
    Factors,
    antisym,
    asymmetry_index,
    residual_matvec,
    residual_operator,
    sym,
    threshold_floor,
)
from geomlib.incrt.optimiser import Remedy, SlotClock, slot_state
from geomlib.incrt.prototypes import DDCLBlock
from geomlib.incrt.pruning import PruneReport, directional_energy, output_bounds, prune_report, regrow_bound
from geomlib.incrt.quantise import Mode, Quantised, soft_quantise
from geomlib.incrt.spectrum import Extremes, extreme_eigenpairs, fix_sign, lanczos_extremes, orthonormalise
from geomlib.incrt.splitting import merge_prototypes, split_prototypes
from geomlib.incrt.tasks import (
    CopyData,
    SentimentData,
    multi_offset_copy,
    sentiment_score,
    sentiment_with_negation,
)
from geomlib.incrt.temperature import Temperature
from geomlib.incrt.trackers import mca_step, oja_step

__all__ = [
    "CopyData",
    "DDCLBlock",
    "DirectionalAttention",
    "EncoderLayer",
    "EncoderOutput",
    "Event",
    "Extremes",
    "Factors",
    "Gate",
    "GradientMotor",
    "Greedy",
    "GrowthConfig",
    "GrowthController",
    "HeadCount",
    "HeadsMotor",
    "Homeostasis",
    "Mode",
    "MotorStatistics",
    "Planted",
    "PruneReport",
    "Quantised",
    "Reading",
    "Remedy",
    "SelfOrganisingEncoder",
    "SentimentData",
    "Separation",
    "SlotClock",
    "Splits",
    "StructuralEvent",
    "TaskMotor",
    "Temperature",
    "antisym",
    "asymmetry_index",
    "between_scatter",
    "close_pairs",
    "compact",
    "concentration",
    "covariance",
    "critical_temperature",
    "directional_energy",
    "draw_tokens",
    "effective_rank",
    "extreme_eigenpairs",
    "fix_sign",
    "free_energy",
    "greedy_directions",
    "growth_rate",
    "head_count_bounds",
    "homeostasis",
    "implicit_force",
    "lanczos_extremes",
    "mca_step",
    "merge_prototypes",
    "motor_statistics",
    "multi_offset_copy",
    "oja_step",
    "orthonormalise",
    "output_bounds",
    "perplexity",
    "planted_operator",
    "prune_report",
    "regrow_bound",
    "residual_matvec",
    "residual_operator",
    "rival_weights",
    "sentiment_score",
    "sentiment_with_negation",
    "separation",
    "slot_state",
    "soft_quantise",
    "split_prototypes",
    "splits",
    "sym",
    "threshold_floor",
    "used_codes",
]
