"""What is measured of emulated devices beyond peaks and rings: the profile, what costs make of it, and memory."""

import dataclasses
from collections.abc import Callable

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
from alpa_like.passes.layouts import WHOLE, TensorSpace

CALLS = (
    CallTime("all-gather", 2, 1e-5, 1e9),
    CallTime("all-gather", 8, 4e-5, 2e9),
    CallTime("all-reduce", 2, 3e-5, 5e8),
)
PROFILE = Profile(2e-6, 1e-10, 4e-9, 5e9, ((512, 1e-9), (4096, 8e-9)), CALLS, ("all-reduce",))
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
    del data["profile"]["bytes_per_s"]
    found = Cluster.from_json(data).profile
    assert found == dataclasses.replace(PROFILE, bytes_per_s=PLAIN.device.memory_bandwidth_bytes_per_s)


@pytest.mark.parametrize("calls", [CALLS[::-1], (CALLS[0], CALLS[0])])
def test_calls_out_of_order_are_named(calls):
    with pytest.raises(ClusterError, match="sorted by kind and members, each once"):
        dataclasses.replace(PROFILE, calls=calls)


@pytest.mark.parametrize(
    ("kind", "mesh", "axes", "combined", "seconds"),
    [
        ("all-gather", (8,), (0,), False, 4e-5 + 1e6 / 2e9),
        ("all-gather", (8,), (0,), True, 4e-5 + 1e6 / 2e9),  # the compiler joins all-reduces only
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
    assert c.kernel_s(1e7, 1e6, "f32") == pytest.approx(2e-6 + 1e-3 + 1e-4)
    assert c.elementwise_s(10, 0, 4) == pytest.approx(1e-9 + 8e-10)  # work, then memory: `exposed` is 1
    assert c.elementwise_s(1, 2, 4) == pytest.approx(8.1e-9 + 8e-10)
    assert c.elementwise_s(1, 0, 40) == pytest.approx(8e-9 + 1e-10)
    assert plain.kernel_s(1e7, 1e6, "f32") == plain.compute_s(1e7, 1e6, "f32")
    assert plain.elementwise_s(100, 100, 4) == plain.compute_s(0.0, 4.0, "f32")
    assert plain.launch_s == plain.turn_s(1e9, 4096) == 0.0


@pytest.mark.parametrize(
    ("row_bytes", "seconds"),
    [(256, 1e-9), (512, 1e-9), (3 * 1024, 1e-9), (4096, 8e-9), (3 * 4096, 8e-9), (2**16, 8e-9), (28, 1e-9)],
)
def test_the_power_of_two_in_the_distance_of_rows_decides_what_columns_cost(row_bytes, seconds):
    assert PROFILE.turn_s(row_bytes) == seconds


@pytest.mark.parametrize("turned", [((4096, 1e-9), (512, 1e-9)), ((768, 1e-9),)])
def test_rows_that_are_no_rising_powers_of_two_are_named(turned):
    with pytest.raises(ClusterError, match="rising powers of two"):
        dataclasses.replace(PROFILE, turned=turned)


def test_gathering_along_the_last_dim_turns_what_is_sent():
    for cluster, extra in ((EMULATED, 1024 * 8192 / 8 * 8e-9), (PLAIN, 0.0)):
        space = TensorSpace((1024, 8192), 32, False, cost(cluster))
        first, last = (m.seconds for d in (0, 1) for m in space.moves((d,)) if m.target == (WHOLE,))
        assert last - first == pytest.approx(extra)


def test_gradients_of_weights_read_a_copy_of_their_left_side():
    """256 rows of 1024 elements on each device: seconds for each element, and memory beside operands and result."""
    x, y = (jax.ShapeDtypeStruct((2048, width), jnp.float32) for width in (1024, 32))
    method = alpa.ManualParallel((P("x"), P("x")), out_specs=P(), mesh_shape=(8,))
    turned = dataclasses.replace(EMULATED, profile=dataclasses.replace(PROFILE, turned=((4096, 1e-8),)))
    plain = dataclasses.replace(EMULATED, profile=dataclasses.replace(PROFILE, turned=()))
    step = alpa.parallelize(lambda x, y: jnp.einsum("tv,td->vd", x, y), method=method)
    found = [step.plan(x, y, cluster=cluster).predicted for cluster in (turned, plain)]
    assert found[0].compute_time_s - found[1].compute_time_s == pytest.approx(256 * 1024 * 1e-8)
    assert found[0].peak_memory_bytes - found[1].peak_memory_bytes == 256 * 1024 * 4


def test_calls_are_fitted_through_a_small_and_a_large_buffer(monkeypatch: pytest.MonkeyPatch):
    def ready(mesh: object, step: Callable[..., object], rows: int, width: int, *_: object) -> tuple[object, float]:
        alone = step.args[0] is profiling._nothing  # type: ignore[attr-defined]
        return step, 0.0 if alone else profiling._COLLECTIVES_IN_A_ROW * (2e-5 + 4 * rows * width / 3e9)

    monkeypatch.setattr(profiling, "_ready", ready)
    monkeypatch.setattr(profiling, "_paired", lambda one, other: one[1] - other[1])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    found = profiling._calls(mesh)
    assert [(c.kind, c.members) for c in found if c.kind == "all-to-all"] == [("all-to-all", n) for n in (2, 4, 8)]
    for call in found:
        assert call.bytes_per_s == pytest.approx(3e9, rel=0.01)
        assert call.latency_s == pytest.approx(2e-5, rel=0.05)


def test_a_pair_is_the_median_of_differences(monkeypatch: pytest.MonkeyPatch):
    runs = [[90, 1], [70, 1], *[[3, 1]] * (profiling._PAIRS - 1)]  # the first pair compiles, the second meets others
    clock = iter(np.cumsum([t for with_, without in runs for t in (0, with_, 0, without)]))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(clock))
    assert profiling._paired((lambda x: x, 0.0), (lambda x: x, 0.0)) == 2.0


@pytest.mark.parametrize("kind", sorted(profiling._COLLECTIVES))
def test_programs_have_the_collective_that_they_measure(kind):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("groups", "members"))
    spec = jax.sharding.PartitionSpec(("groups", "members"))
    step = jax.shard_map(
        lambda x: profiling._among_matmuls(lambda y: profiling._COLLECTIVES[kind](2, y), x),
        mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip
    text = jax.jit(step).lower(jnp.zeros((64, 8))).as_text()
    assert text.count(f"stablehlo.{kind.replace('-', '_')}") == profiling._COLLECTIVES_IN_A_ROW
    assert text.count("stablehlo.dot_general") == profiling._COLLECTIVES_IN_A_ROW


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
    memory = [found.plan(w, x, cluster=c).predicted.peak_memory_bytes for c in (PLAIN, EMULATED)]
    assert memory[1] >= memory[0] + 4 * 2048 * 512 / 4  # a tensor more of a micro-batch, on 4 devices


def test_what_is_no_contraction_is_priced_like_element_wise_work():
    x = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32)
    method = alpa.ManualParallel((P("x"), None), mesh_shape=(8,))
    step = alpa.parallelize(lambda x, y: x.max((1, 2)), method=method)
    found = step.plan(x, jnp.float32(0), cluster=EMULATED).predicted.compute_time_s
    elements = 1024 * 1024
    assert found == pytest.approx(PROFILE.kernel_s + elements * (4 / PROFILE.bytes_per_s + PROFILE.simple_s), rel=0.01)


@pytest.mark.parametrize("members", [2, 3, 5, 6, 7, 8, 12, 16, 17, 32, 64, 100])
def test_buffers_divide_among_any_number_of_members(members):
    for nbytes in profiling._BUFFERS:
        rows, width = profiling._buffer_shape(nbytes, members)
        assert rows % members == width % members == 0
        assert width > 0
    assert members > 16 or 4 * rows * width == pytest.approx(nbytes, rel=0.1)


def test_gradients_of_convolutions_read_a_copy_of_their_left_side():
    x, g = (jax.ShapeDtypeStruct((64, 16, 16, features), jnp.float32) for features in (32, 8))

    def kernel_gradient(x, g):
        def conv(k):
            return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        return jax.vjp(conv, jnp.zeros((3, 3, 32, 8)))[1](g)[0]

    method = alpa.ManualParallel((P("x"), P("x")), out_specs=P(), mesh_shape=(8,))
    step = alpa.parallelize(kernel_gradient, method=method)
    profiles = [dataclasses.replace(PROFILE, turned=turned) for turned in (((512, 1e-9), (4096, 1e-8)), ())]
    found = [step.plan(x, g, cluster=dataclasses.replace(EMULATED, profile=p)).predicted for p in profiles]
    copied = 8 * 16 * 16 * 32
    assert found[0].compute_time_s - found[1].compute_time_s == pytest.approx(copied * 1e-8)
    assert found[0].peak_memory_bytes - found[1].peak_memory_bytes == pytest.approx(4 * copied, rel=0.05)
