"""`tune`: the plan that is fastest when it runs, among the few that are predicted to be.

Predictions rank plans well, but plans that are a few percent apart are told apart by running them only. That costs a
compilation per candidate, which is why it is asked for and not the default.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alpa_like.api import ParallelFunction, parallelize
from alpa_like.cluster import Cluster
from alpa_like.errors import ClusterError, InfeasibleError, MethodError
from alpa_like.methods import DataParallel, ManualParallel, Method, ShardParallel, Zero2Parallel, Zero3Parallel
from alpa_like.plan import Plan
from alpa_like.runtime import session
from alpa_like.texts import seconds_text

__all__ = ["tune"]

logger = logging.getLogger("alpa_like")


def tune(
    step: ParallelFunction,
    *args: Any,
    methods: Sequence[Method] | None = None,
    candidates: int = 4,
    rounds: int = 7,
    cluster: Cluster | None = None,
) -> Plan:
    """Compile and time the `candidates` best plans by prediction on the devices here; the step runs by the fastest.

    args: what the step takes; they are copied, so nothing is donated. For `jax.ShapeDtypeStruct`s zeros are made.
    methods: whose plans are candidates. If not given: the method of `step` on every mesh shape that it allows, and
    where that is `ShardParallel`, also data parallelism and ZeRO. rounds: how often each plan runs, in turns; the
    median counts. Returns the plan, with which `step` is compiled from then on.
    """
    if session.current().remote is not None:
        raise ClusterError("tune times plans on the devices of this process; it can't do so on a Ray cluster")
    if not isinstance(step, ParallelFunction):
        raise MethodError(f"tune needs a step that alpa.parallelize made, found {step!r}")
    if any(type(n) is not int or n < 1 for n in (candidates, rounds)):
        raise MethodError(f"tune needs at least 1 candidate and 1 round, found {candidates!r} and {rounds!r}")
    dynamic = tuple(_filled(a) for i, a in enumerate(args) if i not in step.static_argnums)
    plans = _plans(step, args, methods, cluster)[:candidates]
    times = _times(step, args, dynamic, plans, rounds) if len(plans) > 1 else [0.0]
    for plan, seconds in zip(plans, times, strict=True):
        predicted, measured = seconds_text(plan.predicted.step_time_s), seconds_text(seconds)
        logger.info(
            "%s: %s on mesh %s predicted %s, took %s", step.__name__, plan.method, plan.mesh_shape, predicted, measured
        )
    best = plans[times.index(min(times))]
    step.compile(*args, plan=best)
    return best


def _filled(tree: Any) -> Any:
    """Zeros for abstract arrays."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, tree)


def _plans(
    step: ParallelFunction, args: tuple[Any, ...], methods: Sequence[Method] | None, cluster: Cluster | None
) -> list[Plan]:
    """The different plans of all methods, the best predictions first."""
    first = step.plan(*args, cluster=cluster)
    found = {first.stages: first}
    for method in methods if methods is not None else _methods(step.method, first.cluster.num_devices):
        other = parallelize(
            step.fun,
            method=method,
            donate_argnums=step.donate_argnums,
            batch_argnums=step.batch_argnums,
            static_argnums=step.static_argnums,
        )
        try:
            plan = other.plan(*args, cluster=cluster)
        except InfeasibleError as error:
            logger.info("%s: no candidate by %s: %s", step.__name__, method.name, error)
            continue
        found.setdefault(plan.stages, plan)
    return sorted(found.values(), key=lambda plan: plan.predicted.step_time_s)


def _methods(method: Method, devices: int) -> list[Method]:
    """`method` on each of its mesh shapes, and the methods that are special cases of `ShardParallel`."""
    if not isinstance(method, DataParallel | ManualParallel | ShardParallel | Zero2Parallel | Zero3Parallel):
        raise MethodError(f"tune needs methods=... for a step with the method {type(method).__name__}")
    found: list[Method] = [dataclasses.replace(method, mesh_shape=shape) for shape in method.mesh_shapes(devices)]
    if isinstance(method, ShardParallel) and method.mesh_shape == "auto" and method.axis_names is None:
        budget = method.memory_budget_bytes
        found += [m(memory_budget_bytes=budget) for m in (DataParallel, Zero2Parallel, Zero3Parallel)]
    return found


def _times(
    step: ParallelFunction, args: tuple[Any, ...], dynamic: tuple[Any, ...], plans: Sequence[Plan], rounds: int
) -> list[float]:
    """Median seconds of a step by each plan, all plans in turns; the first round is left out."""
    executables = [step.compile(*args, plan=plan) for plan in plans]
    order, shuffle = list(range(len(plans))), random.Random(0).shuffle
    times: list[list[float]] = [[] for _ in plans]
    for number in range(rounds + 1):
        shuffle(order)
        for i in order:
            given = executables[i].place(*jax.tree.map(jnp.copy, dynamic))
            jax.block_until_ready(given)
            start = time.perf_counter()
            jax.block_until_ready(executables[i](*given))
            if number:
                times[i].append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]
