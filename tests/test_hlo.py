"""Counts of bytes by hand, on literal HLO and on programs compiled for 8 CPU devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alpa_like.runtime.hlo import Collective, HloError, read_collectives, ring_bytes, traffic_by_kind

P = PartitionSpec
LINE8 = "{{0,1,2,3,4,5,6,7}}"
ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))

ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def module(*lines, before=ADD, header="num_partitions=8", operand="f32[1024]{0}"):
    """HLO text whose entry has the parameter %p and these lines."""
    body = "\n  ".join([f"%p = {operand} parameter(0)", *lines])
    return f"HloModule m, is_scheduled=true, {header}\n{before}\nENTRY %main (p: {operand}) -> f32[] {{\n  {body}\n}}\n"


def one(*lines, **parts) -> Collective:
    (collective,) = read_collectives(module(*lines, **parts))
    return collective


def all_reduce(groups, extra=""):
    return f"%r = f32[1024]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add{extra}"


# ---------------------------------------------------------------------------------------------------- kinds

G4 = "channel_id=1, replica_groups=[2,4]<=[8]"
KINDS = {  # instruction on %p = f32[1024]: operand bytes, result bytes, ring bytes (n = 4)
    "all-reduce": ("f32[1024]{0} all-reduce(%p), " + G4, 4096, 4096, 6144),
    "all-gather": ("f32[4096]{0} all-gather(%p), " + G4 + ", dimensions={0}", 4096, 16384, 12288),
    "reduce-scatter": ("f32[256]{0} reduce-scatter(%p), " + G4 + ", to_apply=%add", 4096, 1024, 3072),
    "all-to-all": ("f32[1024]{0} all-to-all(%p), " + G4 + ", dimensions={0}", 4096, 4096, 3072),
    "collective-permute": ("f32[1024]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", 4096, 4096, 4096),
    "collective-broadcast": ("f32[1024]{0} collective-broadcast(%p), " + G4, 4096, 4096, 3072),
}
TOKENS = "(f32[1024]{0}, f32[1024]{0}, u32[], u32[])"
STARTS = {  # async forms of the same six, with the same bytes
    "all-reduce": "f32[1024]{0} all-reduce-start(%p), " + G4 + ", to_apply=%add",
    "all-gather": "(f32[1024]{0}, f32[4096]{0}) all-gather-start(%p), " + G4 + ", dimensions={0}",
    "reduce-scatter": "((f32[1024]{0}), f32[256]{0}) reduce-scatter-start(%p), " + G4 + ", to_apply=%add",
    "all-to-all": "((f32[1024]{0}), f32[1024]{0}, u32[], u32[]) all-to-all-start(%p), " + G4,
    "collective-permute": TOKENS + " collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
    "collective-broadcast": "((f32[1024]{0}), f32[1024]{0}) collective-broadcast-start(%p), " + G4,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["sync", "start", "wrapped"])
def test_each_kind(kind, form):
    line, operand_bytes, result_bytes, sent = KINDS[kind]
    done = f"ROOT %d = f32[] {kind}-done(%c)"
    wrapped = f"\n%w (q: f32[1024]) -> f32[] {{\n  %p = f32[1024]{{0}} parameter(0)\n  ROOT %c = {line}\n}}\n"
    texts = {
        "sync": module(f"ROOT %c = {line}"),
        "start": module(f"%c = {STARTS[kind]}", done),
        "wrapped": module("%s = ((f32[1024]), f32[]) async-start(%p), calls=%w", before=ADD + wrapped),
    }
    (found,) = read_collectives(texts[form])
    assert (found.kind, found.operand_bytes, found.result_bytes) == (kind, operand_bytes, result_bytes)
    assert traffic_by_kind([found]) == {kind: sent}


def test_variadic_operands_count_together():
    tuple_shape = "(f32[1024]{0}, f32[1024]{0})"
    gathered = "((f32[1024], f32[1024]), (f32[4096], f32[4096])) all-gather-start(%p, /*index=1*/%p), "
    assert one(f"%r = {tuple_shape} all-reduce(%p, %p), {G4}, to_apply=%add").operand_bytes == 8192
    assert one(f"%r = {tuple_shape} all-reduce-start(%p, %p), {G4}, to_apply=%add").result_bytes == 8192
    assert one(f"%r = {tuple_shape} all-to-all(%p, %p), {G4}").operand_bytes == 8192
    assert one(f"%r = {gathered}{G4}, dimensions={{0}}").result_bytes == 32768


def test_operands_may_be_printed_with_shapes_and_names_without_percent():
    text = """HloModule m, num_partitions=2
    ENTRY main {
      p = (f32[8]{0:T(256)}, s8[4]{0}) parameter(0)
      a = f32[8]{0:T(256)} get-tuple-element((f32[8]{0:T(256)}, s8[4]{0}) p), index=0
      ROOT g = f32[16]{0} all-gather(f32[8]{0:T(256)} a), replica_groups={{0,1}}, metadata={op_name="g[(\\'y\\',)]{"}
    }"""
    (found,) = read_collectives(text)
    assert (found.operand_bytes, found.result_bytes, found.source) == (32, 64, "g[(\\'y\\',)]{")


def test_nothing_moves_in_groups_of_one_or_between_a_device_and_itself():
    still = "%c = f32[1024]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}"
    alone = all_reduce("{{0},{1},{2},{3},{4},{5},{6},{7}}")
    assert traffic_by_kind(read_collectives(module(still, alone))) == {"all-reduce": 0, "collective-permute": 0}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,16]{1,0:T(8,128)}", 512),
        ("bf16[8,16]{1,0:T(8,128)(2,1)S(1)}", 256),
        ("s4[5]{0:E(4)}", 3),
        ("u4[8]{0}", 4),
        ("pred[3]{0}", 3),
        ("f8e4m3fn[7]{0}", 7),
        ("f4e2m1fn[6]{0}", 3),
        ("c64[2]{0}", 16),
        ("c128[]", 16),
        ("s64[<=3]{0}", 24),
        ("token[]", 0),
        ("(f32[2], (s8[3]{0}, token[]), ())", 11),
    ],
)
def test_shape_bytes(shape, size):
    assert one(f"%r = {shape} all-reduce(%p), {G4}", operand=shape).result_bytes == size


# ---------------------------------------------------------------------------------------------------- device groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ROWS),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ROWS),
        ("[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ROWS),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", COLUMNS),
        ("mesh['a'=2,'b'=4] {'b','a'}", ((0, 4, 1, 5, 2, 6, 3, 7),)),
        ("mesh[a=2,b=4] {a}", COLUMNS),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ROWS),
        ("mesh['a'=4,'b'=2], device_ids=([2,2,2]T(0,2,1)) {'a':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'a'}", ((7, 3), (6, 2), (5, 1), (4, 0))),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=8] {'a':(4)2,'a':(1)2}", ((0, 4, 1, 5), (2, 6, 3, 7))),
    ],
)
def test_replica_groups(text, groups):
    # Compared once with what XLA ran (an all-gather of replica ids on 8, 12 and 16 devices) for 100 random meshes, 38
    # with sub-axes. Not so for device_ids: see test_compiled_contraction_over_two_axes.
    found = one(all_reduce(text, extra=', metadata={op_name="f" source_file="a.py" source_line=3}'))
    assert (found.groups, found.group_size, found.source) == (groups, len(groups[0]), "f a.py:3")


@pytest.mark.parametrize(
    "text",
    [
        "{{0,1},{2}}",
        "{{0}}",
        "{{0,1,2,3},{4,5,6,6}}",
        "{{}}",
        "[2,2]<=[8]",
        "[2,4]<=[8]T(1,0)",
        "[8]<=[8]",
        "mesh['a'=2,'b'=4]",
        "mesh['a'=2,'b'=2] {'a'}",
        "mesh['a'=2,'b'=4] {'c'}",
        "mesh['a'=2,'b'=4] {'b':(3)2}",
        "mesh['a'=2,'b'=4] {'b','b'}",
        "maximal_mesh[device_id=3] {'a'}",
        "@groups",
    ],
)
def test_replica_groups_that_cannot_be_read(text):
    with pytest.raises(HloError, match=r"instruction r: expected .*all-reduce\(%p\)"):
        one(all_reduce(text))


def test_all_devices_need_a_count():
    with pytest.raises(HloError, match="num_partitions"):
        one(all_reduce("{}"), header="x=1")
    assert one(all_reduce("{}"), header="replica_count=2, num_partitions=3").group_size == 6


@pytest.mark.parametrize(
    "line",
    [
        "%r = f32[1024]{0} ragged-all-to-all(%p), replica_groups={}",
        "%r = (f32[1024], u32[], token[]) send(%p), channel_id=1",
        "%r = f32[1024]{0} collective-permute(%p), source_target_pairs={{0,1,2}}",
        "%r = f32[1024]{0} all-reduce(%gone), replica_groups={}",
        "%r = q32[1024]{0} all-reduce(%p), replica_groups={}",
        "%r = f32[1024]{0} custom-call(%p), called_computations={%hidden}",
        "%r = f32[1024]{0} call(%p), to_apply=%nowhere",
        "no instruction",
    ],
)
def test_what_cannot_be_read_raises(line):
    hidden = "%hidden (p: f32[1024]) -> f32[1024] {\n  %p = f32[1024] parameter(0)\n  " + all_reduce("{}") + "\n}\n"
    with pytest.raises(HloError, match=re.escape(line) if "custom" not in line else "hidden"):
        read_collectives(module(line, before=ADD + (hidden if "custom" in line else "")))


def test_a_collective_is_known_by_its_opcode():
    text = module(
        "%all-reduce-fusion = f32[] fusion(%p), kind=kLoop, calls=%add",
        '%call.1 = f32[] custom-call(%p), metadata={op_name="a = f32[] all-reduce(%p), replica_groups={}"}',
        "%send.1 = (f32[1024], u32[], token[]) send(%p), is_host_transfer=true",
    )
    assert read_collectives(text) == ()


# ---------------------------------------------------------------------------------------------------- control flow

LOOP = """
%body (s: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %s = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %p = f32[1024]{0} get-tuple-element(%s), index=1
  %r = f32[1024]{0} all-reduce(%p), replica_groups={}, to_apply=%add
  %step = s32[] constant(STEP)
  %next = s32[] add(%step, %i)
  ROOT %t = (s32[], f32[1024]{0}) tuple(%next, %r)
}

%condition (s: (s32[], f32[1024])) -> pred[] {
  %s = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
"""


def loop(step=1, config=""):
    state = ["%zero = s32[] constant(0)", "%init = (s32[], f32[1024]{0}) tuple(%zero, %p)"]
    line = f"%w = (s32[], f32[1024]{{0}}) while(%init), condition=%condition, body=%body{config}"
    return one(*state, line, before=ADD + LOOP.replace("STEP", str(step)))


@pytest.mark.parametrize(
    ("step", "config", "count", "known"),
    [
        (1, ', backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}', 3, True),
        (1, r', backend_config="{\"known_trip_count\":{\"n\":\"3\"}}"', 3, True),
        (1, "", 6, True),
        (2, "", 1, False),
    ],
)
def test_trip_counts(step, config, count, known):
    found = loop(step, config)
    assert (found.count, found.trip_count_known) == (count, known)
    assert ring_bytes(found) == 7168 * count


def test_of_a_conditional_the_branch_with_most_bytes_counts():
    branch = "%{0} (p: f32[1024]) -> f32[] {{\n  %p = f32[1024]{{0}} parameter(0)\n  {1}\n}}\n"
    before = ADD + branch.format("much", all_reduce("{}")) + branch.format("little", all_reduce("[4,2]<=[8]"))
    both = "branch_computations={%little, %much}", "true_computation=%much, false_computation=%little"
    for branches in both:
        assert one(f"%c = f32[] conditional(%p, %p, %p), {branches}", before=before).group_size == 8


# ---------------------------------------------------------------------------------------------------- scatters

SLICE = "f32[{0}]{{0}} dynamic-slice(%{1}, %at), dynamic_slice_sizes={{{0}}}"
FUSED = """
%fused (a: s32[], b: f32[1024]) -> f32[] {
  %at = s32[] parameter(0)
  %b = f32[1024]{0} parameter(1)
  %c = f32[1024]{0} bitcast(%b)
  %d = f32[128]{0} dynamic-slice(%c, %at), dynamic_slice_sizes={128}
  ROOT %e = f32[128]{0} negate(%d)
}

%converted (b: f32[1024]) -> f32[1024] {
  %b = f32[1024]{0} parameter(0)
  ROOT %c = f16[1024]{0} convert(%b)
}
"""
FUSION = "f32[128]{0} fusion(%at, %r), kind=kLoop, calls=%fused"


@pytest.mark.parametrize(
    ("uses", "scatters"),
    [
        (["%d = " + SLICE.format(128, "r")], True),
        (["%d = " + SLICE.format(128, "r"), "%e = " + SLICE.format(128, "r")], True),
        (["%c = f32[1024]{0} copy(%r)", "%d = " + SLICE.format(128, "c")], True),
        (["%d = " + FUSION], True),
        (["%c = f16[1024]{0} fusion(%r), calls=%converted", "%d = f16[128]{0} dynamic-slice(%c, %at)"], True),
        (["%c = f16[1024]{0} fusion(%r), calls=%converted", "%d = f16[1024]{0} negate(%c)"], False),
        (["%d = " + SLICE.format(256, "r")], False),
        (["%d = " + SLICE.format(128, "r"), "%e = f32[1024]{0} negate(%r)"], False),
        (["%d = " + FUSION, "ROOT %t = (f32[1024]) tuple(%r)"], False),
        ([], False),
    ],
)
def test_scatters(uses, scatters):
    found = one("%at = s32[] constant(0)", all_reduce("{}"), *uses, before=ADD + FUSED)
    assert found.scatters == scatters
    assert traffic_by_kind([found]) == {"all-reduce": 7168}
    expected = {"reduce-scatter": 3584} if scatters else {"all-reduce": 7168}
    assert traffic_by_kind([found], reduce_scatter=True) == expected


@pytest.mark.parametrize("opcode", ["all-reduce", "all-reduce-start"])
def test_operands_of_one_all_reduce_scatter_one_by_one(opcode):
    text = module(
        "%at = s32[] constant(0)",
        f"%q = (f32[1024], f32[1024]) {opcode}(%p, %p), replica_groups={{}}, to_apply=%add",
        *(["%r = (f32[1024], f32[1024]) all-reduce-done(%q)"] if opcode.endswith("start") else []),
        f"%g = f32[1024] get-tuple-element(%{'r' if opcode.endswith('start') else 'q'}), index=0",
        f"%h = f32[1024] get-tuple-element(%{'r' if opcode.endswith('start') else 'q'}), index=1",
        "%d = " + SLICE.format(128, "h"),
        "%n = f32[1024] negate(%g)",
    )
    assert [(c.scatters, c.operand_bytes) for c in read_collectives(text)] == [(False, 4096), (True, 4096)]
    assert traffic_by_kind(read_collectives(text), reduce_scatter=True) == {"all-reduce": 7168, "reduce-scatter": 3584}


# ---------------------------------------------------------------------------------------------------- compiled programs


def mesh(*sizes: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(sizes), ("x", "y")[: len(sizes)])


def compiled(function, sizes, in_specs, out_specs, *shapes) -> str:
    """Text of a shard_map of `function` over f32 arrays."""
    mapped = jax.shard_map(function, mesh=mesh(*sizes), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def scanned(x):
    return jax.lax.scan(lambda carry, _: (jax.lax.psum(carry, "x") * 0.5, None), x, None, length=5)[0]


RING = [(i, (i + 1) % 8) for i in range(8)]
COMPILED = {  # function, mesh, in, out, shape: ring bytes by hand
    "psum": (lambda x: jax.lax.psum(x, "x"), (8,), P(), P(), (1024,), {"all-reduce": 2 * 4096 * 7 // 8}),
    "psum x": (lambda x: jax.lax.psum(x, "x"), (2, 4), P(), P(), (1024,), {"all-reduce": 4096}),
    "psum y": (lambda x: jax.lax.psum(x, "y"), (2, 4), P(), P(), (1024,), {"all-reduce": 2 * 4096 * 3 // 4}),
    "psum pair": (lambda x: jax.lax.psum((x, x[:24]), "x"), (8,), P(), P(), (1000,), {"all-reduce": 7168}),
    "gather": (lambda x: jax.lax.all_gather(x, "y"), (2, 4), P("y"), P(), (1024,), {"all-gather": 4096 * 3 // 4}),
    "scatter": (
        lambda x: jax.lax.psum_scatter(x, "x", tiled=True),
        (8,),
        P(),
        P("x"),
        (1024,),
        {"reduce-scatter": 4096 * 7 // 8},
    ),
    "all to all": (
        lambda x: jax.lax.all_to_all(x, "x", 1, 0, tiled=True),
        (8,),
        P("x"),
        P(None, "x"),
        (64, 64),
        {"all-to-all": 2048 * 7 // 8},
    ),
    "permute": (lambda x: jax.lax.ppermute(x, "x", RING), (8,), P("x"), P("x"), (1024,), {"collective-permute": 512}),
    "scan": (scanned, (8,), P(), P(), (1024,), {"all-reduce": 5 * 7168}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_shard_map(name):
    function, sizes, in_specs, out_specs, shape, expected = COMPILED[name]
    assert traffic_by_kind(read_collectives(compiled(function, sizes, in_specs, out_specs, shape))) == expected


def test_compiled_loop_without_printed_trip_count():
    text = compiled(scanned, (8,), P(), P(), (1024,))
    stripped = re.sub(r"backend_config=\{.*known_trip_count.*", "", text)
    assert stripped != text
    assert read_collectives(stripped) == read_collectives(text)
    source = read_collectives(text)[0].source  # the name in between depends on the version of JAX
    assert "while/body/" in source
    assert source.endswith("/psum")


def test_compiled_loop_of_unknown_length_counts_once():
    def halve(x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: jax.lax.psum(c, "x"), x)

    (found,) = read_collectives(compiled(halve, (8,), P(), P(), (1024,)))
    assert (found.count, found.trip_count_known, ring_bytes(found)) == (1, False, 7168)


@pytest.mark.parametrize(
    ("sizes", "left", "right", "out", "groups", "scatters"),
    [
        ((8,), P(None, "x"), P("x"), P("x"), (tuple(range(8)),), True),
        ((8,), P(None, "x"), P("x"), P(), (tuple(range(8)),), False),
        ((2, 4), P("x", "y"), P("y"), P("x", "y"), ROWS, True),
        ((2, 4), P("y", "x"), P("x"), P("y"), COLUMNS, False),
    ],
)
def test_compiled_matmul_with_sharded_contraction(sizes, left, right, out, groups, scatters):
    shardings = [NamedSharding(mesh(*sizes), spec) for spec in (left, right, out)]
    product = jax.jit(jnp.matmul, in_shardings=tuple(shardings[:2]), out_shardings=shardings[2])
    a, b = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((128, 32), jnp.float32)
    (found,) = read_collectives(product.lower(a, b).compile().as_text())
    rows = 64 // (1 if sizes == (8,) else 8 // len(groups[0]))
    assert (found.groups, found.scatters, found.operand_bytes) == (groups, scatters, rows * 32 * 4)


def test_compiled_contraction_over_two_axes():
    # XLA prints these groups as mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}.
    left, right, out = (NamedSharding(mesh(2, 4), spec) for spec in (P(None, ("x", "y")), P(("x", "y")), P("y")))
    product = jax.jit(jnp.matmul, in_shardings=(left, right), out_shardings=out)
    a, b = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((128, 32), jnp.float32)
    found = read_collectives(product.lower(a, b).compile().as_text())
    assert [(each.groups, each.scatters) for each in found] == [(ROWS, True), (COLUMNS, False)]
    assert traffic_by_kind(found, reduce_scatter=True) == {"all-reduce": 2048, "reduce-scatter": 6144}


def test_compiled_weight_used_four_times_is_gathered_once():
    line = mesh(8)
    split, whole = NamedSharding(line, P("x")), NamedSharding(line, P())

    def loss(w, x):
        hidden = jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole))
        return (hidden @ jax.lax.with_sharding_constraint(w, whole)).sum()

    w = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=split)
    text = jax.jit(jax.grad(loss), out_shardings=split).lower(w, x).compile().as_text()
    assert traffic_by_kind(read_collectives(text))["all-gather"] == 256 * 256 * 4 * 7 // 8
