"""Plans of one model that can be run here: ours, those by hand, and random ones that the solver completes.

A candidate is compiled for the emulated devices of this process. Ours are planned for what was measured of these, so
they have predictions; plans by hand (`benchmarks.experts`) have none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import alpa_like as alpa
from alpa_like.errors import AlpaError
from alpa_like.models import (
    BertConfig,
    GPTConfig,
    LlamaConfig,
    MLPConfig,
    MoEConfig,
    Task,
    UNetConfig,
    ViTConfig,
    WideResNetConfig,
    bert_task,
    gpt_task,
    llama_task,
    mlp_task,
    moe_task,
    unet_task,
    vit_task,
    wide_resnet_task,
)
from alpa_like.plan import Plan
from benchmarks.common import Mesh, measure, measure_executable, mesh_text
from benchmarks.expert_rules import FAMILIES
from benchmarks.experts import Expert, experts
from benchmarks.paired import Runner

__all__ = ["DEVICES", "MODELS", "Candidate", "by_hand", "chosen", "ours", "random_plans"]

DEVICES = 8
MESHES: tuple[Mesh, ...] = ((8,), (2, 4), (4, 2), (2, 2, 2))

_TEXT: dict[str, Any] = dict(vocab_size=2048, seq_len=64, d_model=256, num_heads=8, num_layers=2)


def _adam() -> optax.GradientTransformation:
    return optax.adam(1e-3)


MODELS: dict[str, Callable[[], Task]] = {
    "gpt": lambda: gpt_task(GPTConfig(**_TEXT), 32, _adam()),
    "bert": lambda: bert_task(BertConfig(**_TEXT), 32, _adam()),
    "moe": lambda: moe_task(MoEConfig(**_TEXT, num_experts=8), 32, _adam()),
    "llama": lambda: llama_task(LlamaConfig(**_TEXT, num_kv_heads=4, ffn_dim=704), 32, _adam()),
    "vit": lambda: vit_task(ViTConfig(32, 4, d_model=256, num_heads=8, num_layers=2, num_classes=64), 32, _adam()),
    "wide_resnet": lambda: wide_resnet_task(
        WideResNetConfig((1, 1), channels=32, width_factor=2, num_classes=64, image_size=64), 32, _adam()
    ),
    "unet": lambda: unet_task(UNetConfig(16, channels=32, multipliers=(1, 2), blocks=1, groups=8), 32, _adam()),
    "mlp": lambda: mlp_task(MLPConfig((512, 2048, 2048, 512)), 1024, _adam()),
}
"""Steps of some 50 to 300 ms on 2 cores."""


@dataclass
class Candidate:
    """A compiled plan; `plan` is None for plans by hand. `memory` and `traffic` are XLA's, bytes per device."""

    name: str
    plan: Plan | None
    memory: float
    traffic: float
    step: Callable[[Any, Any], tuple[Any, Any]]
    shardings: tuple[Any, Any]

    def runner(self, task: Task) -> Runner:
        """A runner with a state and a batch of its own."""
        state, batch = (jax.device_put(x, s) for x, s in zip((task.init(), task.batch(0)), self.shardings, strict=True))
        return Runner(self.step, state, batch)


def chosen(task: Task, cluster: alpa.Cluster) -> Candidate:
    """What `ShardParallel` chooses on its own."""
    found = _compiled(task, "automatic", alpa.ShardParallel(), cluster)
    if found is None:
        raise SystemExit(f"no automatic plan for {task.name}; see above")
    return found


def ours(task: Task, cluster: alpa.Cluster) -> Iterator[Candidate]:
    """The best plan on every mesh, and those of the methods that split the batch alone."""
    methods: list[tuple[str, Any]] = [
        (f"ShardParallel {mesh_text(m)}", alpa.ShardParallel(mesh_shape=m)) for m in MESHES
    ]
    for method in (alpa.DataParallel, alpa.Zero2Parallel, alpa.Zero3Parallel):
        methods += [(f"{method.__name__} {mesh_text(m)}", method(mesh_shape=m)) for m in MESHES[:2]]
    yield from _all(task, cluster, methods, "our plans")


def random_plans(task: Task, cluster: alpa.Cluster, count: int, seed: int = 0) -> Iterator[Candidate]:
    """Plans with random layouts for about a third of the parameters, and in turn for all; the solver does the rest."""
    rng = random.Random(seed)
    state = jax.eval_shape(task.init)
    methods: list[tuple[str, Any]] = []
    for number in range(count):
        mesh, share = MESHES[number % len(MESHES)], 1 if number % 2 else 1 / 3
        layouts = jax.tree.map(lambda leaf, m=mesh, s=share: _random_spec(leaf.shape, m, s, rng), state.params)
        specs = jax.tree.map(lambda _: None, state).replace(params=layouts)
        methods.append((f"random {number} {mesh_text(mesh)}", alpa.ManualParallel((specs, None), mesh_shape=mesh)))
    yield from _all(task, cluster, methods, "random plans")


def _random_spec(shape: tuple[int, ...], mesh: Mesh, share: float, rng: random.Random) -> P | None:
    """Each axis on a dim of its own that it divides, or on none; all but a share are None and left to the solver."""
    if rng.random() >= share:
        return None
    entries: list[str | None] = [None] * len(shape)
    for name, size in zip("xyz", mesh, strict=False):
        free = [d for d, n in enumerate(shape) if entries[d] is None and n % size == 0]
        goal = rng.choice([None, *free])
        if goal is not None:
            entries[goal] = name
    return P(*entries)


def by_hand(task: Task, model: str, few: bool) -> Iterator[Candidate]:
    """Plans by hand; `few`: one per idea."""
    kind = model if model in (*FAMILIES, "moe") else "transformer"
    every = [e for e in experts(DEVICES, kind) if not few or _kept(e)]
    for expert in tqdm(every, desc=f"{model}: plans by hand", leave=False):
        compiled = expert.compile(task)
        measured, (shardings, _) = measure(compiled), compiled.input_shardings
        name = f"by hand: {expert.name} {mesh_text(expert.mesh)}"
        yield Candidate(name, None, measured.memory, measured.raw_total, compiled, shardings)


def _kept(expert: Expert) -> bool:
    """One mesh for every kind of plan: 4 × 2 for those with two axes."""
    return expert.mesh[1] in (1, 2)


def _all(task: Task, cluster: alpa.Cluster, methods: Sequence[tuple[str, Any]], label: str) -> Iterator[Candidate]:
    for name, method in tqdm(methods, desc=f"{task.name}: {label}", leave=False):
        found = _compiled(task, name, method, cluster)
        if found is not None:
            yield found


def _compiled(task: Task, name: str, method: Any, cluster: alpa.Cluster) -> Candidate | None:
    """The plan of a method, compiled; None, with the reason printed, where there is none."""
    step = alpa.parallelize(task.step, method=method)
    try:
        executable = step.compile(jax.eval_shape(task.init), task.abstract_batch(), cluster=cluster)
    except AlpaError as error:
        print(f"{task.name}: no plan by {name}: {type(error).__name__}: {error}")
        return None
    measured, (state, batch) = measure_executable(executable), executable.input_shardings
    return Candidate(name, executable.plan, measured.memory, measured.raw_total, executable, (state, batch))
