"""Figures of plans: what they show is what the plan says, every text can be read, and nothing is cut off."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle
from matplotlib.text import Text

import alpa_like as alpa
from alpa_like import viz
from alpa_like.plan import (
    Candidate,
    Pipeline,
    PipelineStage,
    Placed,
    Plan,
    Predicted,
    SolverReport,
    StagePlan,
    bytes_text,
)
from alpa_like.schedule import SCHEDULES
from alpa_like.viz.compare import changes
from alpa_like.viz.folded import sections
from alpa_like.viz.glyphs import MINE
from alpa_like.viz.style import AXIS_COLORS, stage_color, text_width
from alpa_like.viz.tensors import short_path

GIB = 2**30
CLUSTER = alpa.Cluster.p3_16xlarge()


def parameters(layers, spec):
    """Per layer a kernel and its optimizer state, which lies the same, and a bias that is whole on all devices."""
    kernels = (f"state{where}['h{k}']['up']['kernel']" for k in layers for where in (".params", ".opt[0].mu"))
    biases = (f"state.params['h{k}']['up']['bias']" for k in layers)
    return (
        *(Placed(path, (1024, 4096), "float32", spec) for path in kernels),
        *(Placed(path, (4096,), "bfloat16", ((),)) for path in biases),
    )


def plan_of(stage, predicted, pipeline=None, cluster=CLUSTER, considered=()):
    report = SolverReport("optimal", 0.0, 1.0, 0, "HiGHS", considered)
    method = "ShardParallel" if pipeline is None else "PipeshardParallel"
    return Plan("train_step", "0", method, cluster, stage, predicted, report, pipeline=pipeline).verify()


def whole(shape=(2, 4), spec=((0,), (1,)), seconds=2.5e-3, cluster=CLUSTER):
    """A plan without a pipeline: 12 layers, 6 GiB at most, 2 ms of compute."""
    inputs = (*parameters(range(12), spec), Placed("batch['x']", (16, 1024), "float32", ((0,), ())))
    inside = tuple(Placed(f"MLP/h{k}/up", (16, 4096), "float32", ((0,), (1,))) for k in range(12))
    seconds_by_kind = (("all-gather", (seconds - 2e-3) * 0.8), ("slice", (seconds - 2e-3) * 0.2))
    stage = StagePlan(
        "0", shape, ("x", "y"), (0, 8), inputs, (Placed("result[1]", (), "float32", ()),), (),
        collective_s=seconds_by_kind, activations=inside,
    )  # fmt: skip
    predicted = Predicted(seconds, 2e-3, seconds - 2e-3, {"all-gather": 3e6, "all-reduce": 1e6}, 6.0 * GIB)
    considered = (
        Candidate("8", 3e-3, 5.0 * GIB), Candidate("2x4", seconds, 6.0 * GIB), Candidate("4x2", math.inf, math.inf)
    )  # fmt: skip
    return plan_of((stage,), predicted, cluster=cluster, considered=considered)


def chain(stages, micro_batches, schedule="1f1b", *, meshes=None, layers=None, cluster=CLUSTER, scale=1.0):
    """A pipeline of one device per mesh; stage s takes (10 + s % 3) ms forward, twice that backward, holds 64 MiB."""
    meshes, layers = meshes or stages, layers or stages
    cuts = [round(i * layers / stages) for i in range(stages + 1)]
    forward = [scale * (0.010 + 0.001 * (s % 3)) for s in range(stages)]
    ranges = tuple(
        PipelineStage(a, b - 1, s % meshes, s == 1, stages - s, 64 * 2.0**20, f, 2 * f, f, f)
        for s, ((a, b), f) in enumerate(zip(pairwise(cuts), forward, strict=True))
    )
    memory = tuple(14.0 * GIB - m * GIB / 16 for m in range(meshes))
    flops = tuple(1e12 + 1e11 * (k % 3) for k in range(layers))
    ends = tuple(range(1, layers + 1))
    sends = (2e-4 * scale,) * (stages - 1)
    pipeline = Pipeline(micro_batches, schedule, ends, flops, ranges, sends, (0.003 * scale,) * meshes, memory)
    pieces = tuple(
        StagePlan(
            f"forward {s}", (1,), ("x",), (s % meshes, 1), parameters(range(a, b), ((), ())),
            (Placed(f"forward {s}[0]", (4, 1024), "float32", ((), ())),), (),
        )
        for s, (a, b) in enumerate(pairwise(cuts))
    )  # fmt: skip
    predicted = Predicted(pipeline.simulate().makespan_s, 1.0, 0.25, {"all-gather": 1e6}, max(memory))
    return plan_of(pieces, predicted, pipeline, cluster)


PLANS = {
    "whole": whole(),
    "two": chain(2, 4),
    "interleaved": chain(8, 8, "interleaved-1f1b", meshes=4),
    "zero bubble": chain(4, 8, "zb-h1"),
    "inference": chain(4, 4, "inference"),
    "dense": chain(4, 64, layers=96),
    "one": chain(1, 1),
    "many": chain(64, 8, layers=96, cluster=alpa.Cluster.p3_16xlarge(hosts=8)),
    "slow": chain(4, 6, scale=1e3),
}


def named(figure, start):
    """The artists of a figure whose name starts so."""
    return [a for a in figure.findobj() if str(a.get_gid() or "").startswith(start)]


def spans(figure, start):
    """Start and end of every bar of the collections whose name starts so."""
    found = [p.vertices[:, 0] for c in named(figure, start) if isinstance(c, PolyCollection) for p in c.get_paths()]
    return [(x.min(), x.max()) for x in found]


def texts(figure):
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


# ------------------------------------------------------------------------------------- what the figures show


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_timeline_has_a_bar_for_every_task_and_waits_as_long_as_the_plan_says(schedule):
    meshes = 2 if schedule == "interleaved-1f1b" else 4
    pipeline = chain(4, 6, schedule, meshes=meshes).pipeline
    figure = viz.timeline(chain(4, 6, schedule, meshes=meshes))
    ordered = pipeline.ordered()
    tasks = spans(figure, "task")
    assert len(tasks) == sum(map(len, ordered.order))
    until = max(end for _, end in tasks)
    busy = sum(b - a for a, b in tasks)
    assert 1 - busy / (meshes * until) == pytest.approx(pipeline.bubble_fraction())
    filled = busy + sum(b - a for kind in ("waiting", "update") for a, b in spans(figure, kind))
    assert filled == pytest.approx(meshes * pipeline.simulate().makespan_s)
    assert any(f"bubble {100 * pipeline.bubble_fraction():.1f} %" in t for t in texts(figure))


def test_timeline_numbers_the_micro_batches_and_enlarges_what_is_dense():
    assert {"0", "1", "2", "3"} <= set(texts(viz.timeline(PLANS["two"])))
    dense = viz.timeline(PLANS["dense"])
    assert {"Its start", "Its end", "0", "63"} <= set(texts(dense))
    assert "Its start" not in texts(viz.timeline(PLANS["two"]))


def test_timeline_of_a_plan_without_pipeline_is_one_row_of_compute_and_communication():
    figure = viz.timeline(PLANS["whole"])
    assert spans(figure, "compute") == [(0, pytest.approx(2e-3))]
    assert spans(figure, "communication") == [(pytest.approx(2e-3), pytest.approx(2.5e-3))]
    assert not spans(figure, "waiting")


@pytest.mark.parametrize("name", ["two", "interleaved", "zero bubble", "inference", "one"])
def test_memory_peaks_where_the_plan_says(name):
    plan = PLANS[name]
    peaks = {a.get_gid(): max(a.get_ydata()) for a in named(viz.memory(plan), "memory") if isinstance(a, Line2D)}
    assert peaks == {f"memory {m}": pytest.approx(b) for m, b in enumerate(plan.pipeline.memory_bytes)}


def test_memory_counts_the_micro_batches_in_flight():
    (first, second) = (a for a in named(viz.memory(PLANS["two"]), "memory") if isinstance(a, Line2D))
    held = [np.round((line.get_ydata() - min(line.get_ydata())) / (64 * 2**20)).tolist() for line in (first, second)]
    assert held[0] == [0, 1, 2, 1, 2, 1, 2, 1, 0, 0]  # 1F1B of 4 micro-batches: F F B F B F B B
    assert held[1] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]  # F B F B F B F B


def test_memory_of_a_plan_without_pipeline_is_its_peak():
    bars = [a for a in named(viz.memory(PLANS["whole"]), "memory") if isinstance(a, Rectangle)]
    assert sum(b.get_width() for b in bars) == pytest.approx(6 * GIB)
    arguments = 12 * (2 * 1024 * 4096 * 4 / 8 + 4096 * 2) + 16 * 1024 * 4 / 2
    assert bars[0].get_width() == pytest.approx(arguments)


@pytest.mark.parametrize("name", ["two", "interleaved", "zero bubble", "inference"])
def test_breakdown_adds_up_to_the_step_on_every_mesh(name):
    plan = PLANS[name]
    figure = viz.breakdown(plan)
    for mesh in range(plan.pipeline.num_meshes):
        kinds = ("forward", "backward", "input_grad", "weight_grad", "update", "waiting")
        bars = {k: named(figure, f"{k} {mesh}") for k in kinds}
        seconds = {k: b[0].get_width() for k, b in bars.items() if b}
        assert sum(seconds.values()) == pytest.approx(plan.predicted.step_time_s)
        own = [s for s in plan.pipeline.stages if s.mesh == mesh]
        assert seconds["forward"] == pytest.approx(plan.pipeline.num_micro_batches * sum(s.forward_s for s in own))


def test_breakdown_shows_the_seconds_of_every_kind_of_collective():
    figure = viz.breakdown(PLANS["whole"])
    widths = {kind: named(figure, f"{kind} 0")[0].get_width() for kind in ("compute", "all-gather", "slice")}
    assert widths == pytest.approx({"compute": 2e-3, "all-gather": 4e-4, "slice": 1e-4})


def test_breakdown_of_a_pipeline_counts_the_collectives_of_every_micro_batch():
    plan = PLANS["two"]
    stages = tuple(replace(s, collective_s=(("all-reduce", 1e-3),)) for s in plan.stages)
    update = replace(stages[0], name="update 0.0", collective_s=(("all-gather", 2e-3),))
    figure = viz.breakdown(replace(plan, stages=(*stages, update)))
    assert [named(figure, f"all-reduce {m}")[0].get_width() for m in (0, 1)] == pytest.approx([4e-3, 4e-3])
    assert [b.get_width() for b in named(figure, "all-gather")] == pytest.approx([2e-3])
    busy = [sum(named(figure, f"{k} {m}")[0].get_width() for k in ("forward", "backward", "update")) for m in (0, 1)]
    compute = [named(figure, f"compute {m}")[0].get_width() for m in (0, 1)]
    assert compute == pytest.approx([busy[0] - 6e-3, busy[1] - 4e-3])


def test_stages_colours_every_device_by_its_stages():
    figure = viz.stages(PLANS["interleaved"])
    found = {a.get_gid(): a.get_facecolor() for a in named(figure, "device")}
    assert found == {f"device {s % 4} stage {s}": to_rgba(stage_color(s)) for s in range(8)}
    assert {"0+4", "3+7", "14.0 GiB of 16.0 GiB"} <= set(texts(figure))


def test_stages_of_a_plan_without_pipeline_shows_places_in_the_mesh():
    assert {"0,0", "1,3", "2×4 (x, y)"} <= set(texts(viz.stages(PLANS["whole"])))


# --------------------------------------------------------------------------------------------------- shardings


@pytest.mark.parametrize("name", PLANS)
def test_every_parameter_of_the_plan_appears_in_shardings(name):
    plan = PLANS[name]
    tensors = [t for s in sections(plan) for t in s.tensors]
    shown = {p.path for s in plan.stages for p in (*s.inputs, *s.outputs, *s.activations)}
    assert {path for t in tensors for path in t.paths} == shown
    written = texts(viz.shardings(plan))
    for tensor in tensors:
        assert short_path(tensor.name) in written
        assert any(f"{bytes_text(tensor.bytes_each)}" in t for t in written)


def test_repeated_layers_and_their_optimizer_state_are_one_picture():
    section, inside = sections(PLANS["whole"])
    assert [(t.name, t.count, t.bytes_each) for t in inside.tensors] == [("MLP/h*/up", 12, 16 * 4096 * 4 / 8)]
    kernels, biases = section.tensors[0], section.tensors[1]
    assert (kernels.name, kernels.heads, kernels.count) == (
        "['h*']['up']['kernel']",
        ("state.params", "state.opt[0].mu"),
        24,
    )
    assert kernels.bytes_each == 1024 * 4096 * 4 / 8
    assert {biases.name, section.tensors[2].name} == {"['h*']['up']['bias']", "batch['x']"}


@pytest.mark.parametrize(("spec", "lines"), [(((0,), (1,)), [1, 3]), (((1, 0), ()), [4, 3]), (((), ()), [0, 0])])
def test_a_tensor_is_cut_in_the_colours_of_the_axes_and_dark_where_one_device_has_it(spec, lines):
    plan = whole(spec=spec)
    stage = replace(plan.stages[0], inputs=parameters([0], spec)[:1], outputs=(), activations=())
    figure = viz.shardings(replace(plan, stages=(stage,)))
    colors = [a.get_color() for a in figure.findobj(Line2D) if a.axes is None]
    assert [colors.count(c) for c in AXIS_COLORS[:2]] == lines
    areas = {to_rgba(p.get_facecolor()): area(p.get_xy()) for p in figure.findobj(Polygon) if p.get_facecolor()[3]}
    mine, all_of_it = areas[to_rgba(MINE)], max(areas.values())
    devices = math.prod((2, 4)[a] for axes in spec for a in axes)
    assert mine == pytest.approx(all_of_it / devices)


def area(corners):
    x, y = np.asarray(corners)[:4].T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


# ------------------------------------------------------------------------------------------ two or more plans


def test_difference_of_a_plan_and_itself_is_nothing():
    figure = viz.difference(PLANS["whole"], PLANS["whole"])
    assert "Every argument and result lies the same in both plans." in texts(figure)
    assert texts(figure).count("the same") == 5


def test_difference_shows_the_tensors_that_lie_otherwise_and_the_predictions():
    left, right = whole(), whole(spec=((1,), ()), seconds=5e-3)
    (change,) = changes(left, right)
    assert change.name == "['h*']['up']['kernel']"
    assert len(change.paths) == 24
    assert (change.left.cuts, change.right.cuts) == ([[("x", 2)], [("y", 4)]], [[("y", 4)], []])
    figure = viz.difference(left, right)
    a, b = (bar.get_width() for bar in named(figure, "step"))
    assert b / a == pytest.approx(2)
    assert {"24 tensors with another sharding", "2.00 ×"} <= set(texts(figure))


def test_difference_of_pipelines_shows_both_cuts():
    found = texts(viz.difference(PLANS["two"], chain(4, 4, layers=8)))
    assert {"left, layers", "right, layers", "2 layers, 1f1b", "8 layers, 1f1b", "stage 3"} <= set(found)


def test_tradeoff_ranks_what_was_tried_and_places_what_is_known():
    figure = viz.tradeoff(PLANS["whole"], whole(seconds=4e-3), PLANS["two"])
    points = {a.get_gid(): (a.get_xdata()[0], a.get_ydata()[0]) for a in named(figure, "point")}
    assert points["point 1f1b, 2 stages, 4 micro-batches"] == pytest.approx((14, PLANS["two"].predicted.step_time_s))
    bars = {a.get_gid(): a.get_width() for a in named(figure, "candidate")}
    assert points["point mesh 8"] == pytest.approx((5, 3e-3))
    assert bars["candidate mesh 8"] == pytest.approx(3e-3)
    assert bars["candidate mesh 4×2"] == 0
    assert " does not fit" in texts(figure)


# ------------------------------------------------------------------------------------------------- readability


def visible(figure, dpi):
    """What a reader sees of texts: each with its box in pixels. Labels of ticks beyond the axes are not drawn."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ticks, shown = set(), set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            ticks |= {tick.label1, tick.label2}
            shown |= {tick.label1} if low <= tick.get_loc() <= high else set()
    found = [t for t in figure.findobj(Text) if t.get_text().strip() and (t not in ticks or t in shown)]
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in found]


CASES = [
    *((name, "overview") for name in PLANS),
    *(
        (name, figure)
        for name in ("whole", "interleaved")
        for figure in ("stages", "breakdown", "shardings", "tradeoff")
    ),
    *((name, "timeline") for name in ("dense", "whole")),
]


@pytest.mark.parametrize(("name", "figure"), CASES)
def test_texts_do_not_overlap_and_nothing_leaves_the_figure(name, figure):
    drawn = getattr(viz, figure)(PLANS[name])
    found = sorted(visible(drawn, 80), key=lambda pair: pair[1].x0)
    width, height = drawn.get_size_inches() * 80
    assert found
    for n, (text, a) in enumerate(found):
        assert a.x0 >= 0 and a.y0 >= 0 and a.x1 <= width and a.y1 <= height, text  # noqa: PT018
        for other, b in found[n + 1 :]:
            if b.x0 >= a.x1 - 1:
                break
            assert min(a.y1, b.y1) - max(a.y0, b.y0) <= 1.5, (text, other)
    for patch in (p for p in drawn.findobj(Rectangle) if p.axes is None and p is not drawn.patch):
        box = patch.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height  # noqa: PT018


def test_long_names_are_shortened_and_dollars_are_no_formulas():
    long = Placed("state.params" + "['a_rather_long_name_$x_1$']" * 6, (8,), "float32", ((),))
    stage = replace(PLANS["whole"].stages[0], inputs=(long,), outputs=(), pins=())
    figure = viz.shardings(replace(PLANS["whole"], stages=(stage,)))
    (name,) = (t for t in texts(figure) if "long_name" in t)
    assert "…" in name
    assert text_width(name, 7.5, "bold") < 2.5
    visible(figure, 80)


def test_pictures_are_png():
    assert viz.overview_png(PLANS["two"], dpi=40).startswith(b"\x89PNG")
    assert viz.stages(PLANS["two"])._repr_png_().startswith(b"\x89PNG")


def test_matplotlib_is_not_imported_with_alpa_like_pyplot_never_and_a_missing_one_is_asked_for():
    code = (
        "import sys, alpa_like; assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n    import alpa_like.viz\nexcept ModuleNotFoundError as error:\n    print(error)\n"
        "del sys.modules['matplotlib']; import alpa_like.viz; assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'alpa-like[viz]'" in done.stdout
