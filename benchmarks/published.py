"""What Alpa measured on p3.16xlarge hosts (OSDI'22, figure 8), with which plans, and how it counts FLOPs.

Source of all results: repository alpa-projects/alpa, osdi22_artifact/results_e2e.tsv at commit 02b5e33, column
`tflops`, which is per GPU; -1 there means out of memory. Its methods are `megatron` (Megatron-LM v2, the best of a grid
search), `deepspeed` (expert parallel with ZeRO), `parax.ppdp` (pipeline and data parallel only), `parax.intra_only`,
`parax.inter_only` and `parax.auto` (Alpa itself).

Source of Alpa's plans, batch sizes and micro-batches: the suites "Performance test with search solutions found for
p3.16xlarge" of benchmark/alpa/suite_auto_gpt.py, suite_auto_moe.py and suite_wresnet.py there. Alpa recomputed
activations of text models layer by layer, and `tflops` counts the recomputation; that of a Wide-ResNet counts none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alpa_like.models import GPTConfig, MoEConfig

__all__ = ["PUBLISHED", "SOURCE", "WIDE_RESNET_FLOPS", "AlpasPlan", "Result", "gpt_flops", "moe_flops"]

SOURCE = "Alpa (OSDI'22), osdi22_artifact/results_e2e.tsv"


@dataclass(frozen=True, slots=True)
class AlpasPlan:
    """Layers of each stage, its submesh (hosts, devices per host) and its logical mesh."""

    layers: tuple[int, ...]
    submeshes: tuple[tuple[int, int], ...]
    meshes: tuple[tuple[int, ...], ...]


def _equal(stages: int, layers: int, devices: int, mesh: tuple[int, ...] | None = None) -> AlpasPlan:
    return AlpasPlan((layers,) * stages, ((1, devices),) * stages, (mesh or (devices,),) * stages)


def _row(layers: tuple[int, ...], devices: tuple[int, ...]) -> AlpasPlan:
    """Stages on so many devices in a row."""
    return AlpasPlan(layers, tuple((1, n) for n in devices), tuple((n,) for n in devices))


@dataclass(frozen=True, slots=True)
class Result:
    """Published TFLOP/s per GPU of one model; None is out of memory. `rival` is Megatron-LM, DeepSpeed or PP-DP."""

    gpus: int
    alpa: float
    rival: float | None
    intra: float | None
    inter: float | None
    micro_batches: int
    plan: AlpasPlan
    batch_size: int = 1024


PUBLISHED: Mapping[str, Mapping[str, Result]] = {
    "gpt": {
        "350M": Result(1, 45.07, 47.53, 46.2003, 44.2274, 512, _equal(1, 1, 1)),
        "760M": Result(2, 57.92, 55.53, 59.5364, 57.9437, 128, _equal(2, 3, 1)),
        "1.3B": Result(4, 58.21, 55.89, 58.3552, 53.9908, 128, _equal(2, 3, 2)),
        "2.6B": Result(8, 61.61, 50.44, 50.8198, 56.5666, 128, _row((2, 2, 4), (2, 2, 4))),
        "6.7B": Result(16, 60.0, 56.59, 48.423, 59.6848, 64, _equal(2, 4, 8, (2, 4))),
        "15B": Result(32, 59.9, 58.24, 35.074, 49.804, 128, _equal(4, 4, 8, (2, 4))),
        "39B": Result(64, 57.0, 57.84, 2.1098, 50.5459, 1024, _equal(16, 1, 4)),
    },
    "moe": {
        "380M": Result(1, 45.4621, 34.24, 45.4621, 45.4621, 512, _equal(1, 1, 1)),
        "690M": Result(2, 43.03, 33.11, 42.1687, 40.7499, 32, _equal(1, 8, 2)),
        "1.3B": Result(4, 39.92, 34.67, 41.1305, 37.5233, 32, _equal(2, 4, 2)),
        "2.4B": Result(8, 45.76, 40.01, 46.7228, 39.7964, 32, _equal(2, 4, 4)),
        "10B": Result(16, 45.36, 12.91, 22.9137, 31.1186, 16, _equal(2, 4, 8)),
        "27B": Result(32, 38.84, 3.82, 1.5047, None, 128, _equal(8, 1, 4)),
        "70B": Result(64, 36.55, None, 0.2151, None, 64, _equal(8, 1, 8)),
    },
    "wide_resnet": {
        "250M": Result(1, 8.3, 8.3, 8.3738, 8.3, 24, _equal(1, 16, 1), 1536),
        "500M": Result(2, 8.46, 8.24, 8.4803, 8.46, 24, _equal(1, 16, 2), 1536),
        "1B": Result(4, 8.16, 8.08, 8.1457, 6.47, 24, _equal(1, 16, 4), 1536),
        "2B": Result(8, 8.04, 7.72, 7.7145, 5.46, 24, _equal(2, 8, 4), 1536),
        "4B": Result(16, 6.76, 0.37, 4.7175, 0.37, 32, _row((5, 4, 7), (4, 4, 8)), 1536),
        "6.8B": Result(32, 6.60, None, 1.9642, None, 32, _row((5, 4, 4, 3), (8,) * 4), 1536),
        "13B": Result(64, 5.3, None, 0.6971, None, 38, _row((4, 4, 4, 4, 4, 4, 5, 4), (8,) * 8), 1520),
    },
}

WIDE_RESNET_FLOPS: Mapping[str, float] = {
    "250M": 8.3738e12 * 1 * 43.98505,
    "500M": 8.4803e12 * 2 * 42.5034,
    "1B": 8.1457e12 * 4 * 45.10375,
    "2B": 7.7145e12 * 8 * 46.6391,
    "4B": 4.7175e12 * 16 * 77.78465,
    "6.8B": 1.9642e12 * 32 * 154.2054,
    "13B": 0.6971e12 * 64 * 437.8958,
}
"""FLOPs of a step as Alpa counted them in its compiled programs: TFLOP/s × GPUs × mean seconds of `parax.intra_only`,
the one method for which the file has both."""


def gpt_flops(config: GPTConfig, batch_size: int, *, recomputed: bool = True) -> float:
    """FLOPs of a train step, as Alpa and Megatron-LM count them (Narayanan et al. 2021, equation 3).

    96 B S L D² (1 + S / 6D) with the forward pass of all layers done twice, 72 without, and 6 B S D V for the head.
    """
    s, d, factor = config.seq_len, config.d_model, 96 if recomputed else 72
    tokens = batch_size * s
    layers = factor * tokens * config.num_layers * d**2 * (1 + s / (6 * d))
    return layers + 6 * tokens * d * config.vocab_size


def moe_flops(config: MoEConfig, batch_size: int, *, recomputed: bool = True, group: int = 2048) -> float:
    """FLOPs of a train step, as Alpa counts them (benchmark/util.py, compute_moe_tflops), for groups of 2048 tokens.

    Per token forward: 8 D² + 4 S D of attention, 4 r D² of a dense layer (hidden width r D), and of a sparse one twice
    that, the router 2 D E, gating 4 G and dispatch 8 D G; the backward pass takes twice the forward pass.
    """
    s, d, r, tokens = config.seq_len, config.d_model, config.mlp_ratio, batch_size * config.seq_len
    attention = 8 * d**2 + 4 * s * d
    dense = attention + 4 * r * d**2
    sparse = attention + 8 * r * d**2 + 2 * d * config.num_experts + 4 * group + 8 * d * group
    layers = (4 if recomputed else 3) * tokens * config.num_layers / 2 * (dense + sparse)
    return layers + 6 * tokens * d * config.vocab_size
