"""Sharding plans that experts write by hand, as plain `jax.jit`: what our plans are measured against.

    python -m benchmarks.experts                          # step time and traffic of every plan, 8 models
    python -m benchmarks.experts --models gpt,mlp --few   # one mesh for every kind of plan
    python -m benchmarks.experts --clock cpu              # work instead of time, where the machine is not idle

The specs are those of MaxText and levanter (Megatron-LM's for tensor and sequence parallelism, GShard's for experts).
A mesh has two axes: "f" splits the batch, and parameters under FSDP; "t" splits heads, hidden units, vocabulary or
experts. Specs are strings of one character per dim: f, t, b (both axes) or - (whole).

Parameters are placed with `in_shardings` and `out_shardings`. Activations are pinned where experts pin them, after
(and for sequence parallelism before) modules, with `flax.linen.intercept_methods`, so that the models stay as they are.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import InterceptorContext
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alpa_like.models import MoEConfig, Task
from alpa_like.models.moe import MoELayer, top2_gating
from benchmarks.expert_rules import FAMILIES, Family, Rules


@dataclass(frozen=True)
class Expert:
    """A plan by hand. `mesh` are the sizes of f and t.

    params, optimizer: rules for the state. inputs, outputs: rules for what goes into and comes out of modules;
    `logits` of a tied head are the output of `wte.attend`. batch: the axes of the batch.
    """

    name: str
    mesh: tuple[int, int]
    params: Rules
    optimizer: Rules
    outputs: Rules
    inputs: Rules = field(default_factory=dict)
    batch: str = "f"
    dispatched: str = ""

    def compile(self, task: Task) -> Any:
        """The step of `task`, compiled for `mesh[0] * mesh[1]` devices by this plan."""
        count = self.mesh[0] * self.mesh[1]
        mesh = Mesh(np.array(jax.devices()[:count]).reshape(self.mesh), ("f", "t"), axis_types=(AxisType.Auto,) * 2)
        state, batch = jax.eval_shape(task.init), task.abstract_batch()
        states = jax.tree_util.tree_map_with_path(lambda path, x: self._leaf(mesh, path, x), state)
        batches = jax.tree.map(lambda x: _sharding(mesh, self.batch, x.shape), batch)

        def step(state: Any, batch: Any) -> Any:
            with nn.intercept_methods(_Pins(self, mesh)):
                return task.step(state, batch)

        jitted = jax.jit(
            step,
            in_shardings=(states, batches),
            out_shardings=(states, NamedSharding(mesh, P())),
            donate_argnums=0,
        )
        return jitted.lower(state, batch).compile()

    def _leaf(self, mesh: Mesh, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        words = re.findall(r"\w+", jax.tree_util.keystr(path))
        rules = self.optimizer if words[0] == "opt_state" else self.params
        return _sharding(mesh, _find(rules, "/".join(words)), leaf.shape)


@dataclass(frozen=True)
class _Pins:
    """An interceptor that pins what goes into modules and what comes out of them."""

    expert: Expert
    mesh: Mesh

    def __call__(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        if context.method_name not in ("__call__", "attend"):
            return call(*args, **kwargs)
        name = "/".join(context.module.path) + ("/attend" if context.method_name == "attend" else "")
        if args:
            args = (self.pin(args[0], _find(self.expert.inputs, name)), *args[1:])
        if self.expert.dispatched and isinstance(context.module, MoELayer):
            out = self.experts(context.module, args[0])
        else:
            out = call(*args, **kwargs)
        spec = _find(self.expert.outputs, name)
        return (self.pin(out[0], spec), *out[1:]) if isinstance(out, tuple) else self.pin(out, spec)

    def pin(self, value: Any, spec: str) -> Any:
        """`value` constrained to each spec of a rule, one after the other."""
        for each in spec.split():
            value = jax.lax.with_sharding_constraint(value, _sharding(self.mesh, each, value.shape))
        return value

    def experts(self, layer: MoELayer, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`MoELayer.__call__` with GShard's annotations: tokens go to where their expert lives, and come back."""
        cfg: MoEConfig = layer.config
        found = layer.variables["params"]
        gates = jax.nn.softmax(x.astype(jnp.float32) @ found["router"]["kernel"], axis=-1)
        combine, aux = top2_gating(gates, cfg.capacity(x.shape[1]))
        combine = self.pin(combine, f"{self.expert.batch}---")
        local, away = f"-{self.expert.batch}--", self.expert.dispatched
        tokens = self.pin(jnp.einsum("gsec,gsd->egcd", (combine > 0).astype(cfg.dtype), x), local)
        tokens = self.pin(tokens, away)
        tokens = jax.nn.gelu(jnp.einsum("egcd,edf->egcf", tokens, found["wi"].astype(cfg.dtype)))
        tokens = self.pin(jnp.einsum("egcf,efd->egcd", tokens, found["wo"].astype(cfg.dtype)), away)
        tokens = self.pin(tokens, local)
        return jnp.einsum("gsec,egcd->gsd", combine.astype(cfg.dtype), tokens), aux


def _find(rules: Rules, path: str) -> str:
    return next((spec for pattern, spec in rules.items() if fnmatch.fnmatchcase(path, pattern)), "")


def _sharding(mesh: Mesh, spec: str, shape: tuple[int, ...]) -> NamedSharding:
    """Axes that do not divide their dim are dropped; a spec that starts with ">" is aligned with the last dims."""
    if spec.startswith(">"):
        spec = spec[1:].rjust(len(shape), "-")
    names: dict[str, tuple[str, ...]] = {"f": ("f",), "t": ("t",), "b": ("f", "t"), "-": ()}
    entries = [
        names[c] if size % math.prod(mesh.shape[a] for a in names[c]) == 0 else None
        for c, size in zip(spec, shape, strict=False)
    ]
    return NamedSharding(mesh, P(*entries))


# ------------------------------------------------------------------------------------------------ the plans

WHOLE: Rules = {}

FSDP: Rules = {
    "*wte/embedding": "-f",
    "*wpe": "-f",
    "*qkv/kernel": "f---",
    "*/q/kernel": "f---",
    "*/[kv]/kernel": "f--",
    "*out/kernel": ">f",
    "*gate/kernel": "f-",
    "*up/kernel": "f-",
    "*down/kernel": "-f",
    "*patches/kernel": ">f",
    "*head/kernel": "f-",
    "*transform/kernel": "f-",
    "*moe/wi": "-f-",
    "*moe/wo": "--f",
}

MEGATRON: Rules = {
    "*wte/embedding": "t-",
    "*qkv/kernel": "--t-",
    "*qkv/bias": "-t-",
    "*/q/kernel": "-t--",
    "*/[kv]/kernel": "-t-",
    "*out/kernel": "t--",
    "*gate/kernel": "-t",
    "*up/kernel": "-t",
    "*up/bias": "t",
    "*down/kernel": "t-",
    "*head/kernel": "-t",
    "*params/bias": "t",
    "*moe/wi": "--t",
    "*moe/wo": "-t-",
}

FSDP_TP: Rules = {
    "*wte/embedding": "tf",
    "*wpe": "-f",
    "*qkv/kernel": "f-t-",
    "*qkv/bias": "-t-",
    "*/q/kernel": "ft--",
    "*/[kv]/kernel": "ft-",
    "*attn/out/kernel": "t-f",
    "*gate/kernel": "ft",
    "*up/kernel": "ft",
    "*up/bias": "t",
    "*down/kernel": "tf",
    "*head/kernel": "ft",
    "*transform/kernel": "f-",
    "*params/bias": "t",
    "*moe/wi": "-ft",
    "*moe/wo": "-tf",
}

EXPERTS: Rules = {"*moe/wi": "f--", "*moe/wo": "f--"}
EXPERTS_TP_ONLY: Rules = {"*moe/wi": "f-t", "*moe/wo": "ft-"}
EXPERTS_TP: Rules = {**MEGATRON, **EXPERTS_TP_ONLY}


def _activations(residual: str, batch: str = "f", tensor: str = "t") -> Rules:
    """Outputs of modules: the residual stream, and heads, hidden units and vocabulary on the tensor axis."""
    return {
        "": f"{batch}-{tensor}",  # the model's own: logits
        "*/qkv": f"{batch}--{tensor}-",
        "*/[qkv]": f"{batch}-{tensor}",
        "*/gate": f"{batch}-{tensor}",
        "*/up": f"{batch}-{tensor}",
        "head": f"{batch}-{tensor}",
        "wte/attend": f"{batch}-{tensor}",
        "*/router": f"{batch}--",
        "*": residual,
    }


ROW_PARALLEL: Rules = {"*/attn/out": "f-t-", "*/down": "f-t"}
"""Inputs of the row-parallel layers."""

GATHERED: Rules = dict.fromkeys(
    ("*/qkv", "*/[qkv]", "*/gate", "*/up", "*/moe", "head", "transform", "wte/attend"), "f--"
)
"""Sequence parallelism gathers the sequence before the column-parallel layers."""


def experts(devices: int, kind: str) -> list[Expert]:
    """All plans by hand for a number of devices.

    `kind` is a family of `benchmarks.expert_rules`; any other is a transformer, where "moe" adds expert parallelism.
    """
    if kind in FAMILIES:
        return _plain(devices, FAMILIES[kind])
    alone = _activations("f--", tensor="-")
    found = [
        Expert("DP", (devices, 1), WHOLE, WHOLE, alone),
        Expert("ZeRO-2", (devices, 1), WHOLE, FSDP, alone),
        Expert("FSDP", (devices, 1), FSDP, FSDP, alone),
    ]
    for t in (n for n in range(2, devices + 1) if devices % n == 0):
        found += _tensor_parallel((devices // t, t))
    return found + (_expert_parallel(devices) if kind == "moe" else [])


def _plain(devices: int, family: Family) -> list[Expert]:
    """Data parallelism, ZeRO-2, FSDP, and pairs of layers split on their outputs and inputs, alone and together."""
    alone: Rules = {"*": "f"}
    found = [
        Expert("DP", (devices, 1), WHOLE, WHOLE, alone),
        Expert("ZeRO-2", (devices, 1), WHOLE, family.fsdp, alone),
        Expert("FSDP", (devices, 1), family.fsdp, family.fsdp, alone),
    ]
    for t in (n for n in range(2, devices + 1) if devices % n == 0):
        mesh = (devices // t, t)
        found.append(Expert("tensor parallel", mesh, family.tensor, family.tensor, family.outputs))
        if mesh[0] > 1:
            found += [
                Expert("tensor parallel, ZeRO-2", mesh, family.tensor, family.both, family.outputs),
                Expert("FSDP x TP", mesh, family.both, family.both, family.outputs),
            ]
    return found


def _tensor_parallel(mesh: tuple[int, int]) -> list[Expert]:
    plain, sequence = _activations("f--"), {"wte": "f-- ft-", **_activations("ft-")}
    found = [
        Expert("Megatron", mesh, MEGATRON, MEGATRON, plain, ROW_PARALLEL),
        Expert("Megatron, sequence parallel", mesh, MEGATRON, MEGATRON, sequence, {**ROW_PARALLEL, **GATHERED}),
    ]
    if mesh[0] == 1:
        return found
    return [
        *found,
        Expert("Megatron, ZeRO-2", mesh, MEGATRON, FSDP_TP, plain, ROW_PARALLEL),
        Expert("FSDP x TP", mesh, FSDP_TP, FSDP_TP, plain, ROW_PARALLEL),
        Expert("FSDP x TP, sequence parallel", mesh, FSDP_TP, FSDP_TP, sequence, {**ROW_PARALLEL, **GATHERED}),
        Expert("FSDP x TP, residual on t", mesh, FSDP_TP, FSDP_TP, _activations("f-t"), ROW_PARALLEL),
    ]


def _expert_parallel(devices: int) -> list[Expert]:
    """GShard: experts live on the batch axis; with a tensor axis, their hidden units are split over it."""
    alone = _activations("f--", tensor="-")
    zero = {**EXPERTS, **{k: v for k, v in FSDP.items() if "moe" not in k}}
    found = [
        Expert("expert parallel", (devices, 1), EXPERTS, EXPERTS, alone, dispatched="f---"),
        Expert("expert parallel, ZeRO-2", (devices, 1), EXPERTS, zero, alone, dispatched="f---"),
        Expert("expert parallel, FSDP", (devices, 1), zero, zero, alone, dispatched="f---"),
    ]
    for t in (n for n in range(2, devices) if devices % n == 0):
        mesh, pins = (devices // t, t), _activations("f--")
        sharded = {**FSDP_TP, **EXPERTS_TP_ONLY}
        found += [
            Expert("expert x TP", mesh, EXPERTS_TP, EXPERTS_TP, pins, ROW_PARALLEL, dispatched="f---"),
            Expert("expert x TP, ZeRO-2", mesh, EXPERTS_TP, sharded, pins, ROW_PARALLEL, dispatched="f---"),
            Expert("expert x FSDP x TP", mesh, sharded, sharded, pins, ROW_PARALLEL, dispatched="f---"),
        ]
    return found


if __name__ == "__main__":
    from benchmarks.expert_times import main

    main()
