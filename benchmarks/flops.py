"""How many FLOPs a model needs, and how many a device has: the two sides of model FLOP utilization (MFU)."""

from __future__ import annotations

from typing import Any

import jax

import alpa_like as alpa
from alpa_like.models import Task
from alpa_like.tracer import trace

__all__ = ["KINDS", "model_flops", "peak_flops", "peak_of_kind"]

CONTRACTIONS = ("stablehlo.dot_general", "stablehlo.dot", "stablehlo.convolution")

BACKWARD = "transpose("
"""In the name stack of all that `jax.grad` adds for the backward pass."""

KINDS: dict[str, str] = {
    "V100": "p3.16xlarge",
    "A100": "dgx-a100",
    "H100": "dgx-h100",
    "H200": "dgx-h200",
    "TPU v4": "tpu-v4",
    "TPU v5 lite": "tpu-v5e",
    "TPU v5e": "tpu-v5e",
    "TPU v5p": "tpu-v5p",
    "TPU v5": "tpu-v5p",
}
"""Parts of the names that JAX gives devices, and the preset with their data sheet; the first that fits counts."""


def model_flops(task: Task) -> float:
    """Model FLOPs of a step: three times those of the matrix products and convolutions of its forward pass.

    They are read from the operator graph, 2 per multiply-add, loops as often as they run; the backward pass takes each
    product twice, once for what went in and once for the weights. (Its own ops are not counted: those of a strided
    convolution multiply zeros.) For a transformer that is 6 N D for N parameters in matrices and D tokens (Kaplan et
    al. 2020, section 2.1) plus 12 L S² B D for the attention of L layers (Chowdhery et al. 2022, appendix B, which
    leaves out what is computed twice). So give a task that recomputes nothing.
    """
    graph = trace(task.step, (jax.eval_shape(task.init), task.abstract_batch())).graph
    ops = [op for op in graph.ops if op.name in CONTRACTIONS]
    forward = sum(op.count * op.flops for op in ops if BACKWARD not in op.source)
    return (3 if any(BACKWARD in op.source for op in ops) else 1) * forward


def peak_flops(device: alpa.Device, dtype: Any) -> float:
    """Data-sheet FLOP/s of matrix products in `dtype`; float32 by TensorFloat-32 where there is such, JAX's default."""
    name = str(jax.numpy.dtype(dtype))
    has_tf32 = "tensorfloat32" in dict(device.peak_flops)
    return device.flops_per_s("tensorfloat32" if name == "float32" and has_tf32 else name)


def peak_of_kind(kind: str, dtype: Any) -> float | None:
    """The same for a device by the name that JAX gives it; None for one whose data sheet we do not have."""
    preset = next((p for part, p in KINDS.items() if part.lower() in kind.lower()), None)
    return None if preset is None else peak_flops(alpa.Cluster.presets()[preset]().device, dtype)
