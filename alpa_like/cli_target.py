"""What the command line plans: the train step that a file or module of the user holds, and the shapes of its arguments.

The user's code is imported as any module is, so what it does at its top level happens. It is never asked to compute:
example arguments are evaluated by `jax.eval_shape`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import jax

from alpa_like.api import ParallelFunction, parallelize
from alpa_like.errors import AlpaError, CommandError

__all__ = ["DEFAULT_ARGS", "DEFAULT_STEP", "Target", "TheirCode", "load_target"]

DEFAULT_STEP, DEFAULT_ARGS = "train_step", "example_args"
_OURS = ("alpa_like", "jax", "importlib", "_frozen_importlib", "_frozen_importlib_external", "inspect", "contextlib")


@dataclass(frozen=True, slots=True)
class Target:
    """A step, its example arguments (`jax.ShapeDtypeStruct`s, static ones as they are), and the module they are of."""

    step: ParallelFunction
    args: tuple[Any, ...]
    module: ModuleType
    where: str


class TheirCode(AbstractContextManager[None]):
    """Shows what the user's code raises with the user's part of the traceback, then raises `CommandError`.

    Errors that none of the user's lines took part in pass through. So do our own, unless `also_ours`: a wrong option
    in the user's file is best shown where it stands.
    """

    def __init__(self, what: str, advice: str = "", *, also_ours: bool = False) -> None:
        self.what, self.advice, self.also_ours = what, advice, also_ours

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, SystemExit):
            raise CommandError(
                f"{self.what} ended the process (exit code {error.code!r}); what is to run only when it is started "
                'goes below `if __name__ == "__main__":`'
            ) from None
        theirs = _their_part(tb)
        if not isinstance(error, Exception) or (isinstance(error, AlpaError) and not self.also_ours):
            return
        if theirs is None and not isinstance(error, SyntaxError):
            return
        traceback.print_exception(type(error), error.with_traceback(theirs), theirs)
        raise CommandError(f"{self.what} raised {type(error).__name__}, see above{self.advice}") from None


def _their_part(tb: TracebackType | None) -> TracebackType | None:
    """The traceback from the first to the last frame that is neither ours nor JAX's; None if there is none."""
    while tb is not None and _is_ours(tb):
        tb = tb.tb_next
    first = last = step = tb
    while step is not None:
        last = last if _is_ours(step) else step
        step = step.tb_next
    if last is not None:
        last.tb_next = None
    return first


def _is_ours(tb: TracebackType) -> bool:
    module = str(tb.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in _OURS and not module.startswith("alpa_like.models")


def load_target(text: str, args_name: str | None) -> Target:
    """The target `FILE.py:NAME` or `package.module:NAME`; `args_name` names what gives its arguments.

    Raises `CommandError` for what is missing or of another kind, and for what the user's code raises.
    """
    place, name = _split(text)
    module = _from_file(Path(place)) if _is_file(place) else _from_module(place)
    found = _attribute(module, name, place)
    step, make = _step_of(found, name, place)
    if args_name is not None or make is None:
        make = _maker(module, args_name, name, place)
    return Target(step, _shapes(step, make, args_name or DEFAULT_ARGS, place), module, place)


def _split(text: str) -> tuple[str, str]:
    """Where to look and what for. The last colon parts them, if a name follows (so `C:\\train.py` is a file)."""
    place, colon, name = text.rpartition(":")
    if colon and all(part.isidentifier() for part in name.split(".")):
        return place, name
    if colon and not name:
        return place, DEFAULT_STEP
    return text, DEFAULT_STEP


def _is_file(place: str) -> bool:
    return place.endswith(".py") or any(mark in place for mark in "/\\") or Path(place).is_file()


def _from_file(path: Path) -> ModuleType:
    """The module that a file makes, with its folder on the import path as in `python FILE`."""
    if path.is_dir():
        raise CommandError(f"{path} is a folder; name a file in it, as FILE.py:FUNCTION")
    if not path.is_file():
        raise CommandError(f"there is no file {path}; name it as FILE.py:FUNCTION, seen from {Path.cwd()}")
    if path.suffix == ".json":
        raise CommandError(f"{path} is no Python file; to see a plan use `alpa-like show {path}`")
    loader = SourceFileLoader(f"planned_{path.stem}", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(loader.name, path.resolve(), loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look for it
    return _imported(str(path), path.resolve().parent, lambda: (loader.exec_module(module), module)[1])


def _from_module(name: str) -> ModuleType:
    """A module by its dotted name; the working directory is on the import path, as with `python -m`."""
    folder = Path.cwd()
    if not all(part.isidentifier() for part in name.split(".")):
        raise CommandError(f"{name!r} is no file and no module; name a file as FILE.py:FUNCTION, seen from {folder}")
    _search_in(folder)
    with TheirCode(name, also_ours=True):
        try:
            known = importlib.util.find_spec(name)
        except ModuleNotFoundError as error:
            if not error.name or not f"{name}.".startswith(f"{error.name}."):
                raise  # the package is there and imports something that is not
            known = None
    if known is None:
        raise CommandError(f"there is no module {name!r} here; for a file, name it with its ending, as in {name}.py")
    return _imported(name, folder, lambda: importlib.import_module(name))


def _imported(what: str, folder: Path, run: Callable[[], ModuleType]) -> ModuleType:
    """What `run` imports, which sees no command line but its own name."""
    _search_in(folder)
    given = sys.argv
    sys.argv = [what]
    try:
        with TheirCode(what, also_ours=True):
            return run()
    finally:
        sys.argv = given


def _search_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _attribute(module: ModuleType, name: str, place: str) -> Any:
    """`module.name`, dots included; `CommandError` with names that are like it where there is none."""
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise CommandError(f"{place} has no {name!r}; {_similar(name, _steps(module))}")
        found = getattr(found, part)
    return found


def _steps(module: ModuleType) -> list[str]:
    """The names of functions and tasks that a module has of its own."""
    members = [(n, v) for n, v in vars(module).items() if not n.startswith("_") and not inspect.isclass(v)]
    return [n for n, v in members if _is_task(v) or (getattr(v, "__module__", None) == module.__name__ and callable(v))]


def _similar(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(name, known, 3) or known[:8]
    return f"it has {', '.join(close)}" if close else "it has no functions of its own"


def _is_task(value: Any) -> bool:
    """Whether it has what `alpa_like.models.Task` has."""
    return all(callable(getattr(value, name, None)) for name in ("init", "step", "abstract_batch"))


def _step_of(found: Any, name: str, place: str) -> tuple[ParallelFunction, Callable[[], Any] | None]:
    """The step as a parallel function, and what makes its arguments where that is known already."""
    if isinstance(found, ParallelFunction):
        return found, None
    if _is_task(found):
        return parallelize(found.step), lambda: (found.init(), found.abstract_batch())
    if inspect.isclass(found) or not callable(found):
        kind = "a class" if inspect.isclass(found) else f"of type {type(found).__name__}"
        raise CommandError(f"{name!r} of {place} is {kind}; name a function such as train_step(state, batch)")
    return parallelize(found), None


def _maker(module: ModuleType, given: str | None, step: str, place: str) -> Callable[[], Any]:
    """What makes the arguments: a function without arguments, or a value that is taken as it is."""
    if given is None and not hasattr(module, DEFAULT_ARGS):
        raise CommandError(
            f"{place} says nothing about the arguments of {step}: write a function {DEFAULT_ARGS}() that returns them, "
            "as in `return init_state(), make_batch()`, or name one with --args; only their shapes are computed"
        )
    name = given or DEFAULT_ARGS
    found = _attribute(module, name, place)
    if not callable(found):
        return lambda: found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise CommandError(f"{name} of {place} is called without arguments, but: {error}") from None
    return found


def _shapes(step: ParallelFunction, make: Callable[[], Any], name: str, place: str) -> tuple[Any, ...]:
    """The arguments that `make` returns, as shapes; static ones and what is a shape already stay as they are."""
    made: list[tuple[Any, list[Any], Any]] = []

    def arrays() -> list[Any]:
        args = make()
        if type(args) not in (tuple, list):
            raise CommandError(
                f"{name} of {place} must return a tuple with one entry per argument of {step.__name__}, found a value "
                f"of type {type(args).__name__}"
            )
        leaves, tree = jax.tree.flatten([None if i in step.static_argnums else a for i, a in enumerate(args)])
        made.append((args, leaves, tree))
        return [None if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]

    with TheirCode(f"{name} of {place}", "; it is traced for shapes, so the values of arrays are not known there"):
        try:
            computed = jax.eval_shape(arrays)
        except TypeError as error:
            if not made or _their_part(error.__traceback__) is not None:
                raise
            reason = str(error).splitlines()[0].rpartition(" returned ")[2]  # JAX met a result that is no array
            raise CommandError(f"{name} of {place} returns something that is no array: {reason}") from None
    args, leaves, tree = made[-1]
    dynamic = jax.tree.unflatten(tree, [x if new is None else new for x, new in zip(leaves, computed, strict=True)])
    found = tuple(args[i] if i in step.static_argnums else a for i, a in enumerate(dynamic))
    _check_call(step, found, name, place)
    return found


def _check_call(step: ParallelFunction, args: tuple[Any, ...], name: str, place: str) -> None:
    try:
        inspect.signature(step.fun).bind(*args)
    except TypeError as error:
        raise CommandError(
            f"{name} of {place} returns {len(args)} arguments, which {step.__name__} does not take: {error}"
        ) from None
    except ValueError:  # a function without a signature, as some of C are
        return
