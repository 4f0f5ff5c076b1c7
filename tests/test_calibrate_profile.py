"""What is measured of emulated devices beyond peaks and rings: the profile, what costs make of it, and memory."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import alpa_like as alpa
from alpa_like import profiling
from alpa_like.cluster import CallTime, Cluster, Device, Link, Profile
from alpa_like.cost import COLLECTIVES, RingCost
from alpa_like.errors import ClusterError
from alpa_like.passes.groups import form_groups
from alpa_like.passes.intra import Restrictions, build
from alpa_like.passes.layouts import WHOLE, TensorSpace
from alpa_like.passes.liveness import Liveness
from alpa_like.tracer import trace

CALLS = (
    CallTime("all-gather", 2, 1e-5, 1e9),
    CallTime("all-gather", 8, 4e-5, 2e9, 1.5e-5),
    CallTime("all-reduce", 2, 3e-5, 5e8),
)
PROFILE = Profile(2e-6, 1e-10, 4e-9, 5e9, 6e-6, 2e9, 7e-9, 3e-9, 5e-8, CALLS, ("all-reduce",))
PLAIN = Cluster(
    "plain",
    1,
    8,
    Device("cpu", (("float32", 1e10),), 2**33, 1e10, 1.0, exposed=1.0),
    Link(1e9, 1e-6),
    Link(1e9, 1e-6),
    (),
)
EMULATED = dataclasses.replace(PLAIN, profile=PROFILE)


def cost(cluster: Cluster, *mesh: int) -> RingCost:
    return RingCost(cluster, mesh or (8,), native_reduce_scatter=False)


def test_profile_survives_json_and_is_left_out_where_there_is_none():
    assert Cluster.from_json(EMULATED.to_json()) == EMULATED
    assert "profile" not in PLAIN.to_json()
    assert Cluster.from_json(PLAIN.to_json()) == PLAIN


def test_profiles_of_older_files_are_read():
    data = EMULATED.to_json()
    for figure in ("bytes_per_s", "library_s", "operand_bytes_per_s", "columns_s", "window_s", "odd_tap_s"):
        del data["profile"][figure]
    for call in data["profile"]["calls"]:
        del call["queued_s"]
    data["profile"]["turned"] = [[512, 1e-9], [4096, 8e-9]]
    calls = tuple(dataclasses.replace(call, queued_s=None) for call in CALLS)
    expected = Profile(2e-6, 1e-10, 4e-9, PLAIN.device.memory_bandwidth_bytes_per_s, calls=calls, joined=PROFILE.joined)
    assert Cluster.from_json(data).profile == expected


@pytest.mark.parametrize("calls", [CALLS[::-1], (CALLS[0], CALLS[0])])
def test_calls_out_of_order_are_named(calls):
    with pytest.raises(ClusterError, match="sorted by kind and members, each once"):
        dataclasses.replace(PROFILE, calls=calls)


@pytest.mark.parametrize(
    ("kind", "mesh", "axes", "combined", "seconds"),
    [
        ("all-gather", (8,), (0,), False, 4e-5 + 1e6 / 2e9),
        ("all-gather", (8,), (0,), True, 2.75e-5 + 1e6 / 2e9),  # not joined: the mean of one of many and one alone
        ("all-gather", (4, 2), (1,), True, 1e-5 + 1e6 / 1e9),  # not measured in a row
        ("all-gather", (2, 4), (1,), False, 1e-5 + 1e6 / 1e9),  # no entry for 4: that of the most members below
        ("all-reduce", (8,), (0,), False, 3e-5 + 1e6 / 5e8),
        ("all-reduce", (8,), (0,), True, 1e6 / 5e8),
        ("reduce-scatter", (8,), (0,), True, 1e6 / 5e8),  # an all-reduce stands in
        ("all-to-all", (8,), (0,), False, 7e-6 + 1e6 * 7 / 8 / 1e9),  # not measured: a ring
        ("all-gather", (8, 1), (1,), False, 0.0),
    ],
)
def test_measured_calls_go_before_rings(kind, mesh, axes, combined, seconds):
    assert cost(EMULATED, *mesh).collective_s(kind, 1e6, axes, combined=combined) == pytest.approx(seconds)


def test_groups_that_span_hosts_are_no_calls_of_shared_memory():
    two = dataclasses.replace(EMULATED, hosts=2)
    rings = dataclasses.replace(PLAIN, hosts=2)
    for kind in COLLECTIVES:
        a, b = (cost(c, 16).collective_s(kind, 1e6, (0,), combined=False) for c in (two, rings))
        assert a == b


def test_kernels_by_hand():
    c, plain = cost(EMULATED), cost(PLAIN)
    assert c.kernel_s(1e7, 1e6, "f32") == pytest.approx(6e-6 + 1e-3 + 5e-4)
    assert (c.columns_s(1e6), c.copy_s(1e6)) == pytest.approx((7e-3, 4e-4))
    assert (c.odd_taps_s(1e3), c.window_s(1e6)) == pytest.approx((5e-5, 3e-3))
    old = cost(dataclasses.replace(EMULATED, profile=dataclasses.replace(PROFILE, operand_bytes_per_s=None)))
    assert old.kernel_s(1e7, 1e6, "f32") == pytest.approx(6e-6 + 1e-3 + 1e-4)
    assert c.elementwise_s(10, 0, 4) == pytest.approx(1e-9 + 8e-10)  # work, then memory: `exposed` is 1
    assert c.elementwise_s(1, 2, 4) == pytest.approx(8.1e-9 + 8e-10)
    assert c.elementwise_s(1, 0, 40) == pytest.approx(8e-9 + 1e-10)
    assert plain.kernel_s(1e7, 1e6, "f32") == plain.compute_s(1e7, 1e6, "f32")
    assert plain.elementwise_s(100, 100, 4) == plain.compute_s(0.0, 4.0, "f32")
    assert plain.launch_s == plain.library_s == plain.columns_s(1e9) == plain.copy_s(1e9) == 0.0
    assert plain.odd_taps_s(1e9) == plain.window_s(1e9) == 0.0


@pytest.mark.parametrize(
    "figure", ["kernel_s", "library_s", "operand_bytes_per_s", "columns_s", "window_s", "odd_tap_s"]
)
def test_negative_figures_are_named(figure):
    with pytest.raises(ClusterError, match=figure):
        dataclasses.replace(PROFILE, **{figure: -1e-9})


def test_gathering_along_another_than_the_first_dim_copies_what_is_gathered():
    for cluster, extra in ((EMULATED, 2 * 4 * 1024 * 8192 / 5e9), (PLAIN, 0.0)):
        space = TensorSpace((1024, 8192), 32, False, cost(cluster))
        first, last = (m.seconds for d in (0, 1) for m in space.moves((d,)) if m.target == (WHOLE,))
        assert last - first == pytest.approx(extra)


def contract(left, right, dims: int, *, transposed: bool = False):
    """Over the first dims, as gradients of weights are made; `transposed` is how `jax.grad` writes them."""
    over = tuple(range(dims))
    found = jax.lax.dot_general(left, right, ((over, over), ((), ())))
    return found.T if transposed else found


def seconds(step: Callable[..., object], left: tuple[int, ...], right: tuple[int, ...], **figures: float):
    """Seconds of the one contraction of a step on 8 devices, undivided and with its batch divided, by `figures`."""
    free = dataclasses.replace(PROFILE, operand_bytes_per_s=1e30, columns_s=0.0, bytes_per_s=1e30)
    cluster = dataclasses.replace(EMULATED, profile=dataclasses.replace(free, **figures))
    graph = trace(step, [jax.ShapeDtypeStruct(s, jnp.float32) for s in (left, right)]).graph
    groups = form_groups(graph, ())
    problem = build(groups, cost(cluster), Liveness(graph, frozenset()), Restrictions())
    (node,) = (i for i, op in enumerate(groups.nodes) if graph.ops[op].name == "stablehlo.dot_general")
    rule, number = graph.ops[groups.nodes[node]].rule, len(groups.shapes) + node
    batch = (rule.operands[0][0][0],)
    costs = dict(zip(problem.choices[number], problem.problem.unary[number], strict=True))
    return costs[(WHOLE,)], costs[batch]


@pytest.mark.parametrize(
    ("dims", "transposed", "copied", "columns"),
    [
        (1, False, (0, 0), (1, 1)),  # matrices are read as they lie
        (1, True, (0, 0), (1, 1)),
        (2, False, (1, 1), (0, 0)),  # others are copied
        (2, True, (0, 1), (2, 0)),  # unless both sides are read by columns for the transpose of what is not reduced
    ],
)
def test_left_sides_of_gradients_of_weights_are_copied_or_read_by_columns(dims, transposed, copied, columns):
    """Seconds for elements, of an undivided contraction and of one whose batch is divided by 8."""
    step = partial(contract, dims=dims, transposed=transposed)
    rows = (2048,) if dims == 1 else (8, 256)
    cases = {}, {"columns_s": 1e-8}, {"bytes_per_s": 1e6}
    free, read, copy = (np.array(seconds(step, (*rows, 1024), (*rows, 32), **figures)) for figures in cases)
    share = np.array([1, 1 / 8])
    assert read - free == pytest.approx(1e-8 * 2048 * (1024 + 32) * share * columns)
    assert copy - free == pytest.approx(2 * 4 * 2048 * 1024 / 1e6 * share * copied)


def test_batches_of_matmuls_are_copied():
    def step(left, right):
        return jax.lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,)))).transpose(0, 2, 1)

    free, read = (seconds(step, (8, 64, 32), (8, 64, 16), columns_s=s) for s in (0.0, 1e-8))
    assert free == read
    assert seconds(step, (8, 64, 32), (8, 64, 16), bytes_per_s=1e6)[0] - free[0] == pytest.approx(
        2 * 4 * 8 * 64 * 32 / 1e6
    )


def test_matmuls_read_and_write_at_a_rate_of_their_own():
    free, priced = (seconds(jnp.matmul, (64, 512), (512, 128), operand_bytes_per_s=r) for r in (1e30, 1e9))
    assert priced[0] - free[0] == pytest.approx(4 * (64 * 512 + 512 * 128 + 64 * 128) / 1e9)


@pytest.mark.parametrize(("rate", "nbytes_per_s"), [(3e10, 2e9), (2.5e10, 1e9)])
def test_rates_are_fitted_through_two_dense_steps(monkeypatch, rate, nbytes_per_s):
    """Seconds by hand of the steps; what is copied and updated takes its time too."""

    def seconds(rows, width, depth):
        flops, moved = 6 * rows * width**2, 12 * (2 * rows * width + width**2)
        copied = 4 * (2 * rows * width + 3 * width**2)
        return depth * (flops / rate + moved / nbytes_per_s + 3 * PROFILE.library_s + copied / PROFILE.bytes_per_s)

    monkeypatch.setattr(profiling, "_dense_step", lambda mesh, *shape: (shape, None))
    monkeypatch.setattr(profiling, "_once", lambda shape, _: seconds(*shape))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    assert profiling._reached(mesh, PROFILE) == pytest.approx((rate, nbytes_per_s))


@pytest.mark.parametrize("depth", [2, 5])
def test_dense_steps_do_all_matmuls_that_are_counted(depth):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    step, weights = profiling._dense_step(mesh, 2 * profiling._DENSE_LENGTH, 16, depth)
    assert len(re.findall(r" dot\(", step.lower(weights).compile().as_text())) == 3 * depth


def test_what_is_copied_takes_memory():
    """The left side again, beside operands and result; matrices are read as they lie."""
    method = alpa.ManualParallel((P("x"), P("x")), out_specs=P(), mesh_shape=(8,))
    memory = []
    for rows in ((8, 256), (2048,)):
        shapes = (jax.ShapeDtypeStruct((*rows, width), jnp.float32) for width in (1024, 32))
        step = alpa.parallelize(partial(contract, dims=len(rows)), method=method)
        memory.append(step.plan(*shapes, cluster=EMULATED).predicted.peak_memory_bytes)
    assert memory[0] - memory[1] == 256 * 1024 * 4


def test_calls_are_fitted_through_a_small_and_a_large_buffer(monkeypatch: pytest.MonkeyPatch):
    def ready(mesh: object, step: Callable[..., object], rows: int, width: int, *_: object) -> tuple[object, float]:
        alone = step.args[0] is profiling._nothing  # type: ignore[attr-defined]
        start = 5e-6 if step.func is profiling._in_a_row else 2e-5  # type: ignore[attr-defined]
        return step, 0.0 if alone else profiling._COLLECTIVES_IN_A_ROW * (start + 4 * rows * width / 3e9)

    monkeypatch.setattr(profiling, "_ready", ready)
    monkeypatch.setattr(profiling, "_paired", lambda one, other: one[1] - other[1])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    found = profiling._calls(mesh)
    assert [(c.kind, c.members) for c in found if c.kind == "all-to-all"] == [("all-to-all", n) for n in (2, 4, 8)]
    for call in found:
        assert call.bytes_per_s == pytest.approx(3e9, rel=0.01)
        assert call.latency_s == pytest.approx(2e-5, rel=0.05)
        assert call.queued_s == pytest.approx(5e-6, rel=0.1)


def test_kinds_of_collectives_wait_alike():
    calls = [CallTime(kind, 8, latency, 1e9 * latency, queued) for kind, latency, queued in (
        ("all-gather", 3.0, 2.5), ("all-reduce", 9.0, 1.0), ("all-to-all", 2.0, 2.0),
    )]  # fmt: skip
    found = profiling._alike(calls)
    assert {(call.latency_s, call.queued_s) for call in found} == {(3.0, 2.0)}
    assert [call.bytes_per_s for call in found] == [3e9, 9e9, 2e9]


def test_a_pair_is_the_median_of_differences(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profiling, "_PAIRS", 7)
    runs = [[90, 1], [70, 1], *[[3, 1]] * 6]  # the first pair compiles, the second meets others
    clock = iter(np.cumsum([t for with_, without in runs for t in (0, with_, 0, without)]))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(clock))
    assert profiling._paired((lambda x: x, 0.0), (lambda x: x, 0.0)) == 2.0


@pytest.mark.parametrize("around", [profiling._among_matmuls, profiling._in_a_row])
@pytest.mark.parametrize("kind", sorted(profiling._COLLECTIVES))
def test_programs_have_the_collective_that_they_measure(kind, around):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("groups", "members"))
    spec = jax.sharding.PartitionSpec(("groups", "members"))
    step = jax.shard_map(
        lambda x: around(lambda y: profiling._COLLECTIVES[kind](2, y), x),
        mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip
    text = jax.jit(step).lower(jnp.zeros((64, 8))).as_text()
    assert text.count(f"stablehlo.{kind.replace('-', '_')}") == profiling._COLLECTIVES_IN_A_ROW
    matmuls = profiling._COLLECTIVES_IN_A_ROW if around is profiling._among_matmuls else 0
    assert text.count("stablehlo.dot_general") == matmuls


def test_gradients_that_wait_for_each_other_take_memory():
    """Two whole copies at the time of the one all-reduce: what is summed, and the sums."""
    sizes = ((256, 512), (512, 256))
    optimizer = optax.adam(1e-3)

    def step(state, x):
        params, opt = state
        grads = jax.grad(lambda p: jnp.mean((jnp.tanh(x @ p[0]) @ p[1]) ** 2))(params)
        updates, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, updates), opt), jnp.sum(x)

    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in sizes]
    state, x = (params, jax.eval_shape(optimizer.init, params)), jax.ShapeDtypeStruct((64, 256), jnp.float32)
    found = alpa.parallelize(step, method=alpa.Zero2Parallel())
    memory = [found.plan(state, x, cluster=c).predicted.peak_memory_bytes for c in (PLAIN, EMULATED)]
    compiled = found.compile(state, x, cluster=EMULATED).memory_bytes()
    assert memory[1] == pytest.approx(compiled, rel=0.1)
    assert memory[0] < 0.75 * compiled


def test_emulated_devices_keep_what_two_ops_read():
    """Normalized rows, read forward and backward: kept by XLA's CPU backend, computed again by the model of others."""

    def step(w, x):
        def loss(w):
            y = x @ w
            for _ in range(4):
                y = y - y.mean(-1, keepdims=True)
                y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
                y = y * 1.5 + 0.1
            return (y * y * y).sum()

        return jax.grad(loss)(w)

    found = alpa.parallelize(step, method=alpa.DataParallel())
    w, x = jax.ShapeDtypeStruct((64, 512), jnp.float32), jax.ShapeDtypeStruct((8192, 64), jnp.float32)
    memory = [found.plan(w, x, cluster=c).predicted.peak_memory_bytes for c in (PLAIN, EMULATED)]
    compiled = found.compile(w, x, cluster=EMULATED).memory_bytes()
    assert memory[1] == pytest.approx(compiled, rel=0.15)
    assert memory[0] < 0.75 * compiled


def test_pipelines_keep_what_two_ops_read_too():
    def step(w, x):
        def loss(w):
            y = x @ w[0]
            y = y - y.mean(-1, keepdims=True)
            y = y * y.std(-1, keepdims=True)
            y = alpa.mark_pipeline_boundary(y)
            return ((y @ w[1]) ** 2).mean()

        return jax.tree.map(lambda w, g: w - g, w, alpa.grad(loss)(w))

    stages = alpa.ManualStageOption([[0], [1]], [(1, 4), (1, 4)])
    method = alpa.PipeshardParallel(num_micro_batches=2, layer_option=alpa.ManualLayerOption(), stage_option=stages)
    found = alpa.parallelize(step, method=method, batch_argnums=(1,))
    w = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 512), (512, 16))]
    x = jax.ShapeDtypeStruct((4096, 16), jnp.float32)
    plans = [found.plan(w, x, cluster=c) for c in (PLAIN, EMULATED)]
    memory, compiled = [p.predicted.peak_memory_bytes for p in plans], found.compile(w, x, plan=plans[1]).memory_bytes()
    assert memory[1] == pytest.approx(compiled, rel=0.05)  # with a tensor of a micro-batch more, on 4 devices
    assert memory[0] < 0.8 * compiled


def test_what_is_no_contraction_is_priced_like_element_wise_work():
    x = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32)
    method = alpa.ManualParallel((P("x"), None), mesh_shape=(8,))
    step = alpa.parallelize(lambda x, y: x.max((1, 2)), method=method)
    found = step.plan(x, jnp.float32(0), cluster=EMULATED).predicted.compute_time_s
    elements = 1024 * 1024
    assert found == pytest.approx(PROFILE.library_s + elements * (4 / PROFILE.bytes_per_s + PROFILE.simple_s), rel=0.01)


@pytest.mark.parametrize("members", [2, 3, 5, 6, 7, 8, 12, 16, 17, 32, 64, 100])
def test_buffers_divide_among_any_number_of_members(members):
    for nbytes in profiling._BUFFERS:
        rows, width = profiling._buffer_shape(nbytes, members)
        assert rows % members == width % members == 0
        assert width > 0
    assert members > 16 or 4 * rows * width == pytest.approx(nbytes, rel=0.1)


def test_gradients_of_convolutions_read_copies_of_both_sides():
    x, g = (jax.ShapeDtypeStruct((64, 16, 16, features), jnp.float32) for features in (32, 8))

    def kernel_gradient(x, g):
        def conv(k):
            return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        return jax.vjp(conv, jnp.zeros((3, 3, 32, 8)))[1](g)[0]

    method = alpa.ManualParallel((P("x"), P("x")), out_specs=P(), mesh_shape=(8,))
    step = alpa.parallelize(kernel_gradient, method=method)
    figures = {"bytes_per_s": 1e8}, {"bytes_per_s": 1e30, "window_s": 1e-7}, {"bytes_per_s": 1e30, "window_s": 0.0}
    profiles = [dataclasses.replace(PROFILE, **changed) for changed in figures]
    found = [step.plan(x, g, cluster=dataclasses.replace(EMULATED, profile=p)).predicted for p in profiles]
    copied = 8 * 16 * 16 * (32 + 8)
    free = found[2].compute_time_s + copied * PROFILE.window_s
    assert found[0].compute_time_s - free == pytest.approx(2 * 4 * copied / 1e8, rel=0.05)
    assert found[1].compute_time_s - found[2].compute_time_s == pytest.approx(copied * 1e-7, rel=0.01)
    compiled = step.compile(x, g, cluster=EMULATED).memory_bytes()
    assert found[0].peak_memory_bytes == pytest.approx(compiled, rel=0.1)


@pytest.mark.parametrize(
    ("channels", "stride", "order", "taps"),
    [
        (3, 1, "NHWC", 1),
        (3, 2, "NHWC", 1 / 4),
        (4, 1, "NHWC", 0),
        (1, 1, "NHWC", 0),
        (9, 1, "NHWC", 1),
        (3, 1, "NCHW", 1),
    ],
)
def test_an_odd_number_of_channels_takes_longer_at_every_position_of_window_and_result(channels, stride, order, taps):
    """Channels that don't come last are copied, as plain convolutions are; that makes no gradient of a window."""

    def step(x, window):
        numbers = (order, "HWIO", order)
        return jax.lax.conv_general_dilated(x, window, (stride, stride), "SAME", dimension_numbers=numbers)

    images = {"N": 16, "H": 32, "W": 32, "C": channels}
    x = jax.ShapeDtypeStruct(tuple(images[name] for name in order), jnp.float32)
    window = jax.ShapeDtypeStruct((7, 7, channels, 64), jnp.float32)
    method = alpa.ManualParallel((P("x"), None), out_specs=P("x"), mesh_shape=(8,))

    def compute_s(**figures: float) -> float:
        cluster = dataclasses.replace(EMULATED, profile=dataclasses.replace(PROFILE, **figures))
        return alpa.parallelize(step, method=method).plan(x, window, cluster=cluster).predicted.compute_time_s

    free = compute_s(odd_tap_s=0.0, bytes_per_s=1e30)
    expected = 1e-7 * taps * 2 * 32 * 32 * 7 * 7
    assert compute_s(odd_tap_s=1e-7, bytes_per_s=1e30) - free == pytest.approx(expected, rel=1e-6)
    assert compute_s(odd_tap_s=0.0, bytes_per_s=1e30, window_s=1e-6) == free
    copied = 4 * channels * (2 * 32 * 32 + 7 * 7 * 64) * (order == "NCHW")
    assert compute_s(odd_tap_s=0.0, bytes_per_s=1e6) - free == pytest.approx(2 * copied / 1e6, rel=1e-6)


@pytest.mark.parametrize("measure", [lambda mesh: profiling._window_s(mesh, 1e30), profiling._odd_tap_s])
def test_convolutions_are_measured_by_programs_that_have_them(measure, monkeypatch):
    """What is compared are as many convolutions on one side as on the other, and none is folded away."""
    compared = []
    monkeypatch.setattr(profiling, "_paired", lambda *steps: compared.extend(steps) or 8e-3)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    assert 0 < measure(mesh) < 1e-5
    texts = [step.lower(x).compile().as_text() for step, x in compared]
    contractions = [len(re.findall(r" (?:convolution|dot)\(", text)) for text in texts]
    assert contractions == [profiling._TIMES] * 2
    assert " convolution(" in texts[0]


def update_s(step, *shapes: tuple[int, ...]) -> float:
    """Seconds of element-wise work on whole arrays of one device of eight, less what it takes to start."""
    specs = (P(),) * len(shapes) if len(shapes) > 1 else P()
    found = alpa.parallelize(step, method=alpa.ManualParallel(specs, out_specs=P(), mesh_shape=(8,)))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return found.plan(*arguments, cluster=EMULATED).predicted.compute_time_s - PROFILE.kernel_s


def test_element_wise_work_reads_arguments_once_and_writes_results_once():
    n, passed, work = 512 * 512, 4 / PROFILE.bytes_per_s, PROFILE.simple_s
    square = (512, 512)
    assert update_s(lambda p, g: p - 0.1 * g, square, square) == pytest.approx(n * (3 * passed + 2 * work), rel=1e-6)
    # Two operands, but one read.
    assert update_s(lambda x: x * x, square) == pytest.approx(n * (2 * passed + work), rel=1e-6)


def test_arguments_are_read_as_often_as_a_loop_runs():
    def step(x, y):
        return jax.lax.fori_loop(0, 10, lambda _, x: jnp.sin(x) + y, x)

    graph = trace(step, [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2).graph
    assert Liveness(graph, frozenset()).passes(graph.arguments[1]) == 10
