"""What a forward pass keeps: the least bytes by brute force, and enough to compute the rest again."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from alpa_like.models.gpt import GPTConfig
from alpa_like.models.tasks import gpt_task
from alpa_like.passes.flat import function_of, nbytes, reads, sub_jaxpr
from alpa_like.passes.layers import form_layers
from alpa_like.passes.microbatch import split_batch
from alpa_like.passes.pieces import Pieces, StagePiece, StageRange, form_pieces
from alpa_like.passes.residuals import cheap_again
from alpa_like.tracer import trace

SEEDS = range(60)
CHEAP = frozenset(("tanh", "exp", "add", "mul", "broadcast_in_dim", "convert_element_type", "gt", "select_n"))
"""What the programs here have that a compiler fuses; matmuls and sums are the rest."""


# ------------------------------------------------------------------------------------------------ random programs


def step_of(rng: np.random.Generator, values: list[Any]) -> Any:
    """A new value of some that are there: matrices 4×4 and rows of 4."""
    matrices = [v for v in values if v.ndim == 2]
    x, y = (matrices[i] for i in rng.integers(len(matrices), size=2))
    row = next((v for v in reversed(values) if v.ndim == 1), None)
    match int(rng.integers(7)):
        case 0:
            return lax.tanh(x)
        case 1:
            return lax.mul(x, y)
        case 2:
            return lax.dot(x, y)
        case 3:
            return lax.reduce_sum(x, (1,))
        case 4 if row is not None:
            return lax.broadcast_in_dim(row, (4, 4), (0,))
        case 5:
            return lax.select(lax.gt(x, 0.0), x, y)
        case _:
            return lax.exp(row) if row is not None else lax.add(x, y)


def random_program(seed: int, steps: int = 7) -> tuple[np.random.Generator, ClosedJaxpr]:
    rng = np.random.default_rng(seed)

    def program(a: Any, b: Any) -> Any:
        values = [a, b]
        for _ in range(steps):
            values.append(step_of(rng, values))
        return values

    return rng, jax.make_jaxpr(program)(*[jax.ShapeDtypeStruct((4, 4), np.float32)] * 2)


@dataclass(frozen=True)
class Case:
    closed: ClosedJaxpr
    forward: Sequence[JaxprEqn]
    needed: Sequence[Var]
    free: set[Var]

    @property
    def inputs(self) -> list[Var]:
        return list(self.closed.jaxpr.invars)


def random_case(seed: int) -> Case:
    """Some results are needed; of the two arguments each may be there anyway."""
    rng, closed = random_program(seed)
    made = [v for e in closed.jaxpr.eqns for v in e.outvars]
    needed = [v for v in made if rng.random() < 0.4] or made[-1:]
    return Case(closed, closed.jaxpr.eqns, needed, {v for v in closed.jaxpr.invars if rng.random() < 0.5})


def price(values: Iterable[Var]) -> float:
    """Bytes, and one for each value, so that of equals the fewest are kept."""
    return sum(nbytes(v) + 1 for v in values)


def reached(case: Case, kept: Iterable[Var]) -> set[Var]:
    """What follows cheaply from what is kept and what is free."""
    found = set(kept) | case.free
    for eqn in case.forward:
        if eqn.primitive.name in CHEAP and found.issuperset(reads(eqn)):
            found.update(eqn.outvars)
    return found


def least(case: Case) -> float:
    """The price of the best of all choices."""
    values = [v for v in (*case.inputs, *(v for e in case.forward for v in e.outvars)) if v not in case.free]
    choices = itertools.chain.from_iterable(itertools.combinations(values, n) for n in range(len(values) + 1))
    return min(price(kept) for kept in choices if reached(case, kept).issuperset(case.needed))


def kept_by(case: Case, again: dict[Var, JaxprEqn]) -> list[Var]:
    """What must be there for the needed values: themselves, or what their equations read in the end."""
    read = dict.fromkeys([*case.needed, *(v for e in again.values() for v in reads(e))])
    return [v for v in read if v not in again and v not in case.free]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_least_bytes_are_kept(seed: int) -> None:
    case = random_case(seed)
    again = cheap_again(case.forward, case.needed, case.free)
    assert {e.primitive.name for e in again.values()} <= CHEAP
    assert all(v in e.outvars for v, e in again.items())
    assert price(kept_by(case, again)) == least(case)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_kept_gives_the_same_values_again(seed: int) -> None:
    case = random_case(seed)
    again = cheap_again(case.forward, case.needed, case.free)
    arguments = np.random.default_rng(seed).standard_normal((2, 4, 4)).astype(np.float32)
    outs = [v for e in case.forward for v in e.outvars]
    whole = function_of(sub_jaxpr(case.forward, case.inputs, outs, {}), "whole")
    known = dict(zip([*case.inputs, *outs], [*arguments, *whole(*arguments)], strict=True))
    kept = [*kept_by(case, again), *case.free]
    order = [e for e in case.forward if any(v in again for v in e.outvars)]
    rest = function_of(sub_jaxpr(order, kept, list(case.needed), {}), "again")
    for found, var in zip(rest(*[known[v] for v in kept]), case.needed, strict=True):
        np.testing.assert_array_equal(found, known[var])


def one_case(program: Any, needed: slice, *, free: bool = False) -> tuple[list[str], list[str]]:
    """What is kept, by the primitive that makes it, and what is done again."""
    closed = jax.make_jaxpr(program)(*[jax.ShapeDtypeStruct((4, 4), np.float32)] * 2)
    made = {v: e.primitive.name for e in closed.jaxpr.eqns for v in e.outvars}
    case = Case(closed, closed.jaxpr.eqns, list(made)[needed], set(closed.jaxpr.invars) if free else set())
    again = cheap_again(case.forward, case.needed, case.free)
    return [made.get(v, "argument") for v in kept_by(case, again)], [e.primitive.name for e in again.values()]


def test_of_a_chain_one_value_is_kept() -> None:
    kept, again = one_case(lambda a, b: lax.exp(lax.tanh(lax.dot(a, b))), slice(0, None))
    assert (kept, sorted(again)) == (["dot_general"], ["exp", "tanh"])


def test_a_matmul_is_never_done_again() -> None:
    kept, again = one_case(lambda a, b: lax.tanh(lax.dot(a, b)), slice(0, None), free=True)
    assert (kept, again) == (["dot_general"], ["tanh"])


def test_what_follows_from_arguments_is_not_kept() -> None:
    assert one_case(lambda a, b: lax.tanh(lax.mul(a, b)), slice(1, None), free=True) == ([], ["tanh", "mul"])


def test_a_small_value_is_kept_instead_of_what_it_spreads_to() -> None:
    def program(a: Any, b: Any) -> Any:
        row = lax.tanh(lax.reduce_sum(lax.dot(a, b), (1,)))
        return lax.exp(lax.broadcast_in_dim(row, (4, 4), (0,)))

    kept, again = one_case(program, slice(-1, None))
    assert kept in (["reduce_sum"], ["tanh"])
    assert "exp" in again


def test_a_mask_is_kept_instead_of_numbers_where_it_is_all_that_is_read() -> None:
    kept, _ = one_case(lambda a, b: lax.gt(lax.dot(a, b), 0.0), slice(-1, None))
    assert kept == ["gt"]


# ------------------------------------------------------------------------------------------------ a transformer


@cache
def gpt_pieces(remat: bool) -> Pieces:
    """Two stages of one block."""
    task = gpt_task(GPTConfig(32, 8, 16, 2, num_layers=2), 8, optax.sgd(0.1))
    layers = form_layers(split_batch(trace(task.step, (jax.eval_shape(task.init), task.abstract_batch())), 2), 2)
    return form_pieces(layers, [StageRange(n, n, n, remat) for n in range(2)])


def piece(pieces: Pieces, name: str) -> StagePiece:
    return next(p for p in pieces.pieces if p.name == name)


def handed(remat: bool, *, micro: bool = True) -> float:
    """Bytes that the first block's forward piece hands to its backward piece."""
    pieces = gpt_pieces(remat)
    made = set(piece(pieces, "forward 0").outputs)
    return sum(nbytes(v) for v in piece(pieces, "backward 0").inputs if v in made)


def test_a_block_keeps_much_less_than_its_backward_pass_reads() -> None:
    """Per token: four numbers of width d and one of 4 d from each of the matmuls, probabilities, and some per row."""
    layers = gpt_pieces(remat=False).layers
    read = {v for e in layers.backward[0] for v in reads(e)} & {v for e in layers.forward[0] for v in e.outvars}
    tokens, width, heads = 4 * 8, 16, 2
    matmuls = tokens * (3 * width + width + 4 * width) + tokens * heads * 8  # queries to values, attention, hidden
    streams = tokens * 4 * width  # what enters, the middle, and what the norms make of them at most
    assert 4 * matmuls <= handed(remat=False) <= 4 * (matmuls + streams + 8 * tokens + 2 * tokens * heads)
    assert handed(remat=False) < 0.6 * sum(nbytes(v) for v in read)


def test_with_rematerialization_nothing_that_the_layer_makes_is_kept() -> None:
    assert handed(remat=True) == 0
    pieces = gpt_pieces(remat=True)
    activation = set(piece(pieces, "forward 0").outputs) & set(piece(pieces, "forward 1").inputs)
    assert len(activation) == 1
    assert activation <= set(piece(pieces, "backward 1").inputs)


def matmuls(pieces: Pieces, name: str) -> int:
    return sum(e.primitive.name == "dot_general" for e in piece(pieces, name).equations)


def test_only_rematerialization_does_matmuls_again() -> None:
    """A block has six matmuls, so twelve in its backward pass; the last one is not read by it."""
    kept, again = gpt_pieces(remat=False), gpt_pieces(remat=True)
    assert [matmuls(p, "forward 0") for p in (kept, again)] == [6, 6]
    assert [matmuls(p, "backward 0") for p in (kept, again)] == [12, 12 + 5]
