"""Operator graphs of small programs against counts by hand; nothing here is compiled but one step."""

import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_like as alpa
from alpa_like import models
from alpa_like.errors import GraphError
from alpa_like.graph import Op, OpGraph, Rule, Tensor, batch_dims, dtype_bits, identity_rule, meets_batch
from alpa_like.tracer import trace

X, W, STACK = jnp.ones((16, 8)), jnp.ones((8, 8)), jnp.ones((4, 8, 8))
IMAGES, KERNEL = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 8))
CHIP = alpa.Device("chip", (("float32", 1e9),), 2**30, 1e9, 1.0)
CLUSTER = alpa.Cluster("eight", 1, 8, CHIP, alpa.Link(1e9, 0.0), alpa.Link(1e9, 0.0), ("made up",))


def graph(function, *args):
    found = trace(function, args).graph
    found.verify()
    return found


def ops(function, *args, name):
    return [op for op in graph(function, *args).ops if op.name.split(".")[-1] == name]


def one(function, *args, name):
    (op,) = ops(function, *args, name=name)
    return op


def layer(x, w):
    return jnp.tanh(x @ w), None


# ------------------------------------------------------------------------------------------------ loops

LOOPS = {  # function of (x, w, stack) and how often its body runs
    "scan": (lambda x, w, s: jax.lax.scan(layer, x, s)[0], 4),
    "reverse scan": (lambda x, w, s: jax.lax.scan(layer, x, s, reverse=True)[0], 4),
    "half unrolled": (lambda x, w, s: jax.lax.scan(layer, x, s, unroll=2)[0], 4),
    "wholly unrolled": (lambda x, w, s: jax.lax.scan(layer, x, s, unroll=4)[0], 4),
    "scan of scans": (
        lambda x, w, s: jax.lax.scan(lambda c, v: jax.lax.scan(lambda d, _: layer(d, v), c, None, 3), x, s)[0],
        12,
    ),
    "rematerialized": (lambda x, w, s: jax.lax.scan(jax.checkpoint(layer), x, s)[0], 4),
    "fori_loop": (lambda x, w, s: jax.lax.fori_loop(2, 10, lambda _, c: layer(c, w)[0], x), 8),
    "while": (
        lambda x, w, s: jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 4, layer(c[1], w)[0]), (0, x)),
        3,
    ),
    "unknown": (lambda x, w, s: jax.lax.fori_loop(0, s[0, 0, 0].astype(int), lambda _, c: layer(c, w)[0], x), 1),
    "cond": (lambda x, w, s: jax.lax.cond(x.sum() > 0, lambda c: layer(c, w)[0], lambda c: c, x), 1),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_counted_as_often_as_it_runs(name):
    function, times = LOOPS[name]
    products = ops(function, X, W, STACK, name="dot_general")
    assert sum(op.count for op in products) == times
    assert sum(op.count * op.flops for op in products) == times * 2 * 16 * 8 * 8
    assert sum(op.count for op in ops(function, X, W, STACK, name="tanh")) == times


def test_carries_alias_and_constants_are_read_where_they_are():
    found = graph(lambda x, w: jax.lax.fori_loop(0, 5, lambda _, c: c @ w, x), X, W)
    (product,) = [op for op in found.ops if op.name == "stablehlo.dot_general"]
    (carry, result) = next(pair for pair in found.aliases if found.tensors[pair[0]].shape == (16, 8))
    assert product.operands == (carry, found.arguments[1])  # the weights need no entry into the loop
    assert found.results == (result,)
    assert {op.name for op in found.ops if carry in op.results or result in op.results} == {"enter", "yield"}


@pytest.mark.parametrize("name", ["scan", "scan of scans", "fori_loop"])
def test_backward_loops_run_as_often(name):
    function, times = LOOPS[name]
    found = graph(lambda x, w, s: jax.grad(lambda x: function(x, w, s).sum())(x), X, W, STACK)
    products = [op for op in found.ops if op.name == "stablehlo.dot_general"]
    assert {op.count for op in products} == {float(times)}
    assert len(products) == 2


def test_rematerialization_repeats_the_forward_products():
    def loss(w, remat):
        block = (
            jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w)) if remat else lambda x: jnp.sin(jnp.sin(x @ w) @ w)
        )
        return block(X).sum()

    plain, remat = (len(ops(lambda w, r=r: jax.grad(loss)(w, r), W, name="dot_general")) for r in (False, True))
    assert (plain, remat) == (5, 7)  # 2 forward, 3 backward; both forward ones again


def test_custom_derivatives_are_stepped_into():
    @jax.custom_vjp
    def triple(x):
        return 3 * x

    triple.defvjp(lambda x: (triple(x), None), lambda _, g: (g @ W,))
    found = ops(jax.grad(lambda x: triple(jnp.tanh(x)).sum()), X, name="dot_general")
    assert [op.flops for op in found] == [2 * 16 * 8 * 8]
    assert "transpose" in found[0].source


# ------------------------------------------------------------------------------------------------ flops and rules

FLOPS = {  # function, arguments, op, flops
    "matmul": (lambda x, w: x @ w, (X, W), "dot_general", 2 * 16 * 8 * 8),
    "batched matmul": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (STACK, STACK), "dot_general", 2 * 4 * 8 * 8 * 8),
    "outer product": (lambda a, b: jnp.einsum("i,j->ij", a, b), (X[:, 0], X[0]), "dot_general", 2 * 16 * 8),
    "inner product": (lambda a, b: a @ b, (X[0], W[0]), "dot_general", 2 * 8),
    "convolution": ("SAME", 1, 2 * (2 * 6 * 6 * 8) * (3 * 3 * 4)),
    "valid convolution": ("VALID", 1, 2 * (2 * 4 * 4 * 8) * (3 * 3 * 4)),
    "strided convolution": ("SAME", 2, 2 * (2 * 3 * 3 * 8) * (3 * 3 * 4)),
    "element-wise": (lambda x: jnp.tanh(x), (X,), "tanh", 16 * 8),
    "reduction": (lambda x: x.sum(0), (X,), "reduce", 16 * 8),
}


def convolve(x, k, padding="SAME", stride=1, groups=1):
    dims = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=dims, feature_group_count=groups)


@pytest.mark.parametrize("name", FLOPS)
def test_flops_by_hand(name):
    if "convolution" in name:
        padding, stride, flops = FLOPS[name]
        op = one(lambda x, k: convolve(x, k, padding, stride), IMAGES, KERNEL, name="convolution")
    else:
        function, args, kind, flops = FLOPS[name]
        op = one(function, *args, name=kind)
    assert op.flops == flops


def test_flops_of_a_grouped_convolution():
    op = one(lambda x, k: convolve(x, k, groups=2), IMAGES, KERNEL[:, :, :2], name="convolution")
    assert op.flops == 2 * (2 * 6 * 6 * 8) * (3 * 3 * 2)  # each feature sees half of the channels


def test_flops_of_a_train_step_are_three_times_the_forward_ones():
    task = models.small_tasks()["mlp"]
    found = trace(task.step, (jax.eval_shape(task.init), task.abstract_batch())).graph
    forward = 2 * 16 * (32 * 64 + 64 * 64 + 64 * 8)
    unneeded = 2 * 16 * 32 * 64  # nobody asks for the gradient of the inputs
    assert sum(op.flops for op in found.ops if op.name == "stablehlo.dot_general") == 3 * forward - unneeded


RULES = {  # function, arguments, op: the rule as text, summed factors, factors that can't be split, carries a layout
    "matmul": (lambda x, w: x @ w, (X, W), "dot_general", "([f0, f2], [f2, f1])->([f0, f1])", {2}, set(), False),
    "transpose": (lambda x: x.T, (X,), "transpose", "([f1, f0])->([f0, f1])", set(), set(), True),
    "add": (lambda x: x + x, (X,), "add", "([f0, f1], [f0, f1])->([f0, f1])", set(), set(), True),
    "erf": (jax.lax.erf, (X,), "erf", "([f0, f1])->([f0, f1])", set(), set(), True),
    "sum": (lambda x: x.sum(0), (X,), "reduce", "([f0, f1], [])->([f1])", {0}, set(), False),
    "argmax": (lambda x: x.argmax(0), (X,), "reduce", "([f0, f1], [f0, f1], [], [])->([f1], [f1])", set(), {0}, False),
    "split a dim": (lambda x: x.reshape(4, 4, 8), (X,), "reshape", "([f0f1, f2])->([f0, f1, f2])", set(), set(), False),
    "add a dim": (lambda x: x.reshape(16, 1, 8), (X,), "reshape", "([f0, f2])->([f0, f1, f2])", set(), set(), True),
    "gather": (lambda x: x[jnp.array([1, 2])], (X,), "gather", "([f2, f1], [f0, f3])->([f0, f1])", {2}, {3}, False),
    "scatter": (
        lambda x: x.at[jnp.array([1, 2])].add(1.0),
        (X,),
        "scatter",
        "([f2, f1], [f0, f3], [f0, f1])->([f2, f1])",
        {0},
        {3},
        False,
    ),
    "sort": (lambda x: jnp.sort(x, 0), (X,), "sort", "([f0, f1])->([f0, f1])", set(), {0}, False),
    "cumsum": (lambda x: jnp.cumsum(x, 1), (X,), "reduce_window", "([f0, f1], [])->([f0, f1])", set(), {1}, False),
    "concatenate": (
        lambda x: jnp.concatenate([x, x]),
        (X,),
        "concatenate",
        "([f0, f1], [f0, f1])->([f0, f1])",
        set(),
        {0},
        False,
    ),
    "dynamic_slice": (
        lambda x: jax.lax.dynamic_slice(x, (3, 0), (4, 8)),
        (X,),
        "dynamic_slice",
        "([f0, f1], [], [])->([f0, f1])",
        set(),
        {0},
        False,
    ),
    "fft": (jnp.fft.fft, (X.astype(complex),), "fft", "([f0, f1])->([f0, f1])", set(), {1}, False),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_those_of_shardy(name):
    function, args, kind, text, reduction, fixed, carries = RULES[name]
    op = one(function, *args, name=kind)
    assert str(op.rule) == text
    assert (op.rule.reduction, op.elementwise) == (reduction, carries)
    # a factor of one element can't be split; whether Shardy says so depends on its version
    assert {f for f in op.rule.fixed ^ fixed if op.rule.sizes[f] > 1} == set()
    assert op.has_rule


def test_a_partial_update_keeps_the_updated_dims_whole():
    def update(x, part):
        return jax.lax.dynamic_update_slice(x, part, (3, 0))

    op = one(update, X, X[:4], name="dynamic_update_slice")
    assert op.rule.sizes[op.rule.results[0][0][0]] == 16
    assert op.rule.results[0][0][0] in op.rule.fixed
    assert op.rule.results[0][1][0] not in op.rule.fixed


def test_a_scatter_that_writes_once_keeps_what_it_writes_into_whole():
    """With one index per row it is split: the gradient of a look-up, of which every device does its columns."""
    once = one(lambda x, i: x.at[i, i].add(1.0), X, jnp.int32(3), name="scatter")
    assert {dim[0] for dim in once.rule.results[0]} <= once.rule.fixed
    rows = jnp.arange(16)[:, None] % 8
    each = one(jax.grad(lambda x, i: jnp.take_along_axis(x, i, 1).sum()), X, rows, name="scatter")
    assert not {f for dim in each.rule.results[0] for f in dim} & each.rule.fixed


def test_convolution_splits_batch_and_features_only():
    op = one(convolve, IMAGES, KERNEL, name="convolution")
    batch, rows, columns, features = (dim for dim in op.rule.results[0])
    (channels,) = op.rule.operands[0][3]
    assert (op.rule.operands[0][0], op.rule.operands[1][3], op.rule.operands[1][2]) == (batch, features, (channels,))
    assert op.rule.reduction == {channels}
    assert {*rows, *columns} <= op.rule.fixed
    window = [op.rule.sizes[f] for dim in op.rule.operands[1][:2] for f in dim]
    assert math.prod(window) == 9
    assert {f for dim in op.rule.operands[1][:2] for f in dim} <= op.rule.fixed
    assert not {*batch, *features} & op.rule.fixed


@pytest.mark.parametrize("kind", ["cholesky", "eigh", "triangular_solve"])
def test_what_a_library_call_works_on_stays_whole(kind):
    """Only the batch dim of a LAPACK call can be split."""
    function = {
        "cholesky": jnp.linalg.cholesky,
        "eigh": lambda a: jnp.linalg.eigh(a)[1],
        "triangular_solve": lambda a: jax.lax.linalg.triangular_solve(a, a),
    }[kind]
    op = one(function, STACK, name="custom_call")
    free = {f for f, n in enumerate(op.rule.sizes) if n > 1} - op.rule.fixed
    assert free <= {op.rule.operands[0][0][0]}


# ------------------------------------------------------------------------------------------------ kinds of values


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("f32", 32), ("bf16", 16), ("f8E4M3FN", 8), ("ui8", 8), ("i4", 4), ("i1", 8), ("complex<f32>", 64), ("token", 0)],
)
def test_bits_of_a_dtype(dtype, bits):
    assert dtype_bits(dtype) == bits


def test_mixed_precision_keeps_its_dtypes():
    found = graph(lambda x, w: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32), X, W)
    (product,) = [op for op in found.ops if op.name == "stablehlo.dot_general"]
    assert [found.tensors[t].dtype for t in (*product.operands, *product.results)] == ["bf16"] * 3
    assert [found.tensors[t].bytes for t in (*found.arguments, *product.results)] == [512, 256, 256]
    assert all(op.elementwise for op in found.ops if op.name == "stablehlo.convert")


def test_dropout_draws_its_mask_without_a_rule_missing():
    def drop(key, x):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)

    found = graph(drop, jax.random.PRNGKey(0), X)
    assert not found.unruled
    assert found.tensors[found.results[0]].shape == (16, 8)
    assert [found.tensors[t].dtype for t in found.arguments] == ["ui32", "f32"]


SMALL = models.small_tasks()


@pytest.mark.parametrize("name", SMALL)
def test_the_graphs_of_the_models_hold_together(name):
    task = SMALL[name]
    traced = trace(task.step, (jax.eval_shape(task.init), task.abstract_batch()))
    found = traced.graph
    found.verify()
    assert [found.tensors[t].shape for t in found.arguments] == [leaf.shape for leaf in traced.arguments]
    assert [found.tensors[t].shape for t in found.results] == [leaf.shape for leaf in traced.results]
    assert all(op.has_rule for op in found.ops if op.name != "chlo.top_k")
    layers = {op.count for op in found.ops if op.name == "stablehlo.dot_general"}
    assert layers == ({1.0, 2.0} if name == "gpt_scan" else {1.0})


def test_where_an_op_comes_from():
    def block(x, w):
        with jax.named_scope("up"):
            return jnp.tanh(x @ w).sum()

    first, second = ops(lambda x, w: jax.grad(block, 1)(x, w), X, W, name="dot_general")
    assert "jvp(up)" in first.source
    assert "transpose(jvp(up))" in second.source


def test_the_digest_is_that_of_the_content():
    def step(x, w):
        return jnp.tanh(x @ w)

    variants = [
        graph(step, X, W),
        graph(lambda x, w: jnp.tanh(x @ w) + 1, X, W),
        graph(lambda x, w: jnp.sin(x @ w), X, W),
        graph(step, X[:8], W),
        graph(step, X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)),
        graph(lambda x, w: (jnp.tanh(x @ w), x), X, W),
        graph(lambda w, x: jnp.tanh(x @ w), W, X),
        graph(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ w), x), X, W),
        graph(lambda x, w: jax.lax.fori_loop(0, 4, lambda _, c: jnp.tanh(c @ w), x), X, W),
    ]
    assert graph(step, X, W).digest == variants[0].digest
    assert all(a.digest != b.digest for a, b in itertools.combinations(variants, 2))


def test_programs_whose_ops_keep_other_dims_whole_have_other_digests():
    """Same ops on the same shapes; a plan made for one may be wrong for the other."""
    square = jnp.ones((8, 8))
    pairs = [
        (lambda x: jnp.sort(x, 0), lambda x: jnp.sort(x, 1)),
        (lambda x: x @ x, lambda x: x @ x.T),
        (lambda x: x.sum(0), lambda x: x.sum(1)),
    ]
    for left, right in pairs:
        assert graph(left, square).digest != graph(right, square).digest


# ------------------------------------------------------------------------------------------------ batch and errors


def test_the_batch_dim_is_followed_through_the_program():
    def forward(params, x):
        hidden = jnp.tanh(x @ params["up"]).reshape(16, 2, 4).transpose(1, 0, 2)
        return hidden, (x**2).sum(0), params["up"] * 2

    traced = trace(forward, ({"up": W, "unused": W}, X))
    found = traced.graph
    marked = batch_dims(found, frozenset(found.arguments[i] for i in traced.batch))
    assert [marked.get(t, frozenset()) for t in found.results] == [{1}, set(), set()]
    read = meets_batch(found, frozenset(found.arguments[i] for i in traced.batch))
    names = {leaf.path: t in read for leaf, t in zip(traced.arguments, found.arguments, strict=True)}
    assert names == {"params['up']": True, "params['unused']": False, "x": False}


def test_an_op_without_a_rule_is_listed_with_its_line_and_runs():
    def step(state, x):
        values, indices = jax.lax.top_k(x @ state, 3)
        return state + values.sum(), indices

    alpa.init(CLUSTER)
    parallel = alpa.parallelize(step)
    x = np.random.default_rng(0).standard_normal((16, 8), np.float32)
    (warning,) = parallel.plan(W, x).warnings
    line = 1 + next(i for i, text in enumerate(Path(__file__).read_text().splitlines()) if "top_k(x @ state" in text)
    assert f"chlo.top_k at {__file__}:{line}" in warning
    assert warning in str(parallel.plan(W, x))
    (state, indices), (expected, best) = parallel(W + 0, x), jax.jit(step)(W, x)
    np.testing.assert_array_equal(indices, best)
    np.testing.assert_allclose(state, expected, rtol=1e-5)
    alpa.shutdown()


def test_a_shard_map_is_refused_with_its_place():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec()
    )

    def step(x):
        return total(x) + 1

    with pytest.raises(GraphError, match=r"shard_map at .*test_graph\.py:\d+.*remove the shard_map"):
        graph(step, X)


def test_graphs_that_do_not_hold_together_are_refused():
    tensors = (Tensor(0, (4,), "f32", -1), Tensor(1, (4,), "f32", 0))
    op = Op(0, "negate", (0,), (1,), identity_rule((4,)), 1.0, 4.0, "", "")
    OpGraph(tensors, (op,), (0,), (1,)).verify()
    with pytest.raises(GraphError, match="before they are made"):
        OpGraph(tensors, (op,), (), (1,)).verify()
    with pytest.raises(GraphError, match="made by no op"):
        OpGraph(tensors, (), (0,), (1,)).verify()
    with pytest.raises(GraphError, match="do not fit the rule"):
        OpGraph(tensors, (Op(0, "negate", (0,), (1,), identity_rule((4, 1)), 1.0, 4.0, "", ""),), (0,), (1,)).verify()
    with pytest.raises(GraphError, match="only 1 sizes"):
        Rule((4,), (((0,),),), (((1,),),))


def test_the_text_of_a_graph():
    found = graph(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, c: c @ w, x), X, W)
    assert "= stablehlo.dot_general " in str(found)
    assert str(found).splitlines()[-1].endswith("x3")
    assert math.prod(found.tensors[found.results[0]].shape) == 128
