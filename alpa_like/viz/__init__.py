"""Figures of a plan: what lies where, what runs when, what it costs. Each needs a `Plan` alone, and no device.

    from alpa_like import viz
    viz.overview(plan)                          # a notebook shows it
    viz.timeline(plan).savefig("step.png", dpi=150)

Every function returns a `matplotlib.figure.Figure` of its own; nothing of `pyplot` is touched. Colours can be told
apart by colour-blind people: pale ones are stages, strong ones mesh axes. Times and bytes are those that the plan
predicts.
"""

from __future__ import annotations

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "alpa_like.viz draws with matplotlib, which is not installed; run: pip install 'alpa-like[viz]'",
        name="matplotlib",
    ) from error

from alpa_like.plan import Plan
from alpa_like.texts import bytes_text, counted, seconds_text
from alpa_like.viz.bars import Breakdown, Work
from alpa_like.viz.candidates import Ranking, Scatter, candidates
from alpa_like.viz.cluster_map import LayerStrip, stage_panels
from alpa_like.viz.compare import Changes, Predictions, Strips, changes
from alpa_like.viz.data import memory_limit
from alpa_like.viz.held import Memory, MemoryBar
from alpa_like.viz.style import MARGIN, WIDTH, Beside, Panel, png, sheet
from alpa_like.viz.tensors import cards_of, largest
from alpa_like.viz.timeline import Timeline, schedule_panels

__all__ = [
    "breakdown",
    "difference",
    "memory",
    "overview",
    "overview_png",
    "shardings",
    "stages",
    "timeline",
    "tradeoff",
]

_INNER = WIDTH - 2 * MARGIN
_FEW = 16
"""Meshes whose times are broken down in an overview."""


def overview(plan: Plan) -> Figure:
    """The most telling figures of a plan on one sheet: stages, schedule, memory or time, the largest tensors."""
    panels = stage_panels(plan, _INNER)
    if plan.pipeline is None:
        panels += [Breakdown(plan), MemoryBar(plan)]
    else:
        few = plan.pipeline.num_meshes <= _FEW
        panels += [Timeline(plan), *([Breakdown(plan)] if few else []), Memory(plan)]
    return sheet(_title(plan), _summary(plan), [*panels, *largest(plan, 9)])


def stages(plan: Plan) -> Figure:
    """The cluster's devices coloured by stage, with layers, mesh and memory of each, and the work of every layer."""
    panels = stage_panels(plan, _INNER)
    if plan.pipeline is not None:
        panels.append(LayerStrip(plan))
    return sheet(f"Stages of {plan.function}", [str(plan.cluster)], panels)


def shardings(plan: Plan) -> Figure:
    """Every argument, result and activation that the plan names, cut as its sharding cuts it.

    Tensors whose paths differ in numbers only are one picture, and the optimizer's state of a parameter stands with it
    where it lies the same. Activations are those of the forward pass, one for all that must lie alike.
    """
    return sheet(f"Shardings of {plan.function}", [str(plan.cluster)], cards_of(plan))


def timeline(plan: Plan) -> Figure:
    """The simulated schedule with its bubbles; without a pipeline, compute and communication on one mesh."""
    return sheet(f"Schedule of {plan.function}", _summary(plan)[1:], schedule_panels(plan, _INNER))


def memory(plan: Plan) -> Figure:
    """Memory per device of each mesh during the step against the limit; without a pipeline, the peak alone."""
    panel = MemoryBar(plan) if plan.pipeline is None else Memory(plan)
    return sheet(f"Memory of {plan.function}", _summary(plan)[1:], [panel])


def breakdown(plan: Plan) -> Figure:
    """Where the predicted time of a step goes, for each mesh."""
    panels: list[Panel] = [Breakdown(plan)]
    if plan.pipeline is not None:
        panels.append(Work(plan))
    return sheet(f"Predicted time of {plan.function}", _summary(plan)[1:], panels)


def tradeoff(plan: Plan, *others: Plan) -> Figure:
    """Time against memory of a plan, of the others that were considered for it, and of other plans of the same step."""
    found = tuple(candidates(plan, others))
    scatter = Scatter(found, memory_limit(plan))
    return sheet(f"Time and memory of {plan.function}", [str(plan.cluster)], [Beside(Ranking(found), scatter, 5.6)])


def difference(left: Plan, right: Plan) -> Figure:
    """What two plans predict and decide differently: figures, stages, and the tensors that lie otherwise."""
    found = tuple(changes(left, right))
    count = sum(len(c.paths) for c in found)
    title = f"{count} tensor{'s' * (count > 1)} with another sharding" if found else "Shardings"
    panels: list[Panel] = [Predictions(left, right), Strips(left, right), Changes(found, title)]
    return sheet(
        f"Two plans of {left.function}", [f"left: {_summary(left)[0]}", f"right: {_summary(right)[0]}"], panels
    )


def overview_png(plan: Plan, dpi: float = 110) -> bytes:
    """`overview` as a PNG file."""
    return png(overview(plan), dpi)


def _title(plan: Plan) -> str:
    return f"Plan of {plan.function} by {plan.method}: {seconds_text(plan.predicted.step_time_s)} per step"


def _summary(plan: Plan) -> list[str]:
    """The cluster, and the predictions in one line."""
    p = plan.predicted
    text = f"step {seconds_text(p.step_time_s)}, peak memory {bytes_text(p.peak_memory_bytes)} per device"
    if plan.pipeline is not None:
        q = plan.pipeline
        text += f", {counted(len(q.stages), 'stage')}, {counted(q.num_micro_batches, 'micro-batch')}"
        text += f", schedule {q.schedule}"
    return [f"{plan.method} for {plan.cluster}", f"{text}, traffic {bytes_text(p.total_traffic_bytes)} per device"]
