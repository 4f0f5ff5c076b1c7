"""Inlines the calls of a StableHLO module, so that `main` holds every op once per execution site.

MLIR's own `inline` pass does not know `func.call` as JAX registers it, and a function that is called twice
could be given one sharding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax.extend.mlir import ir

__all__ = ["Where", "inline_calls", "where"]

Where = tuple[str, str]
"""An op's name stack, such as `jvp(GPT)/h0/up/dot_general`, and the innermost file and line of the user's code."""


def inline_calls(module: Any) -> None:
    """Replace every `func.call` in `main` by the body of its function, in place; the functions are dropped."""
    functions = {_symbol(op): op for op in module.body.operations if op.operation.name == "func.func"}
    with module.context:
        _inline_block(functions["main"].regions[0].blocks[0], functions)
        for name, function in functions.items():
            if name != "main":
                function.operation.erase()


def _symbol(op: Any) -> str:
    return str(op.operation.attributes["sym_name"]).strip('"')


def _inline_block(block: Any, functions: dict[str, Any]) -> None:
    for view in list(block.operations):
        op = view.operation
        if op.name == "func.call":
            _inline_call(op, functions)
        else:
            _inline_regions(op, functions)


def _inline_call(call: Any, functions: dict[str, Any]) -> list[Any]:
    """Put the body of a call in its place; the values that its results became."""
    callee = functions[str(call.attributes["callee"]).removeprefix("@").strip('"')]
    block = callee.regions[0].blocks[0]
    values = dict(zip(block.arguments, call.operands, strict=True))
    point = ir.InsertionPoint(call)
    returned: list[Any] = []
    for view in block.operations:
        source = view.operation
        if source.name == "func.return":
            returned = [values[v] for v in source.operands]
            break
        clone = source.clone(point)
        clone.location = _joined(call.location, source.location)
        _replace(clone, values)
        is_call = clone.name == "func.call"
        made = _inline_call(clone, functions) if is_call else list(clone.results)
        values.update(zip(source.results, made, strict=True))
        if not is_call:
            _inline_regions(clone, functions)
    for result, value in zip(call.results, returned, strict=True):
        result.replace_all_uses_with(value)
    call.erase()
    return returned


def _inline_regions(op: Any, functions: dict[str, Any]) -> None:
    for region in op.regions:
        for block in region.blocks:
            _inline_block(block, functions)


def _replace(op: Any, values: dict[Any, Any]) -> None:
    """Let an op, and everything inside it, read the caller's values."""
    for i, value in enumerate(op.operands):
        if value in values:
            op.operands[i] = values[value]
    for region in op.regions:
        for block in region.blocks:
            for view in block.operations:
                _replace(view.operation, values)


def _joined(outer: Any, inner: Any) -> Any:
    """The location of an op whose call stands at `outer`: both name stacks, one after the other."""
    name = "/".join(n for n in (_name(outer), _name(inner)) if n)
    child = outer if isinstance(inner, ir.UnknownLoc) else inner
    return ir.Location.name(name, child.child_loc if isinstance(child, ir.NameLoc) else child)


def _name(location: Any) -> str:
    return location.name_str if isinstance(location, ir.NameLoc) else ""


def where(location: Any, *, line: bool) -> Where:
    """The name stack of a location and, if asked for, its file and line outside of installed packages."""
    stack = _name(location)
    stack = stack.partition("/")[2] if stack.startswith("jit(") else stack
    if not line:
        return stack, ""
    frames = list(_frames(location))
    own = [f for f in frames if "site-packages" not in f] or frames
    return stack, own[0] if own else ""


def _frames(location: Any) -> Iterator[str]:
    """`file:line` of a location and its callers, innermost first."""
    match location:
        case ir.NameLoc():
            yield from _frames(location.child_loc)
        case ir.CallSiteLoc():
            yield from _frames(location.callee)
            yield from _frames(location.caller)
        case ir.FusedLoc():
            for part in location.locations:
                yield from _frames(part)
        case ir.FileLineColLoc():
            yield f"{location.filename}:{location.start_line}"
        case _:
            return
