"""One entry to all benchmarks.

    python -m benchmarks                                        # what there is
    python -m benchmarks gpt --size 1.3B --cluster p3.16xlarge --remat --plan-only
    python -m benchmarks gpt --size laptop --steps 20           # plans, compiles and runs on the devices here
    python -m benchmarks paper --rows gpt                       # a table; the rest are options of its script

A model is a family of `alpa_like.models.SIZES`; a table is a module of this folder with `main(arguments)`.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent

ALIASES = {"demo": "gpt"}
"""Modules that a model of the same name hides."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the first argument names; returns the exit code. What can't be read or written is one sentence."""
    try:
        code = _named(arguments)
        print(end="", flush=True)
    except OSError as error:
        if error.filename is None:  # stdout takes no more: what it still holds goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # who reads has enough, as `head` has
            return 141
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return code


def _named(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (given[0], given[1:]) if given else ("", [])
    if name in ("", "-h", "--help"):
        print(f"{__doc__}\n{listing()}")
        return 0
    module = ALIASES.get(name, name.replace("-", "_"))
    if (name in ALIASES or module not in ALIASES.values()) and _summary(module) is not None:
        return _script(module, rest)
    return _model(name, rest)


def _script(module: str, rest: list[str]) -> int:
    """Run a table; what is wrong with its input is one sentence and exit code 2."""
    script = importlib.import_module(f"benchmarks.{module}")
    from alpa_like import AlpaError

    sys.argv[0] = f"python -m benchmarks {module}"  # what its help calls it
    try:
        code = script.main(rest)
    except AlpaError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _model(name: str, rest: list[str]) -> int:
    from alpa_like.models import SIZES  # brings JAX, whose start scripts want to prepare
    from benchmarks import model

    if name.replace("-", "_") in SIZES:
        return model.main([name, *rest])
    tables = ", ".join((*ALIASES, *(n for n in scripts() if n not in ALIASES.values())))
    print(
        f"benchmarks: nothing is named {name!r}; choose a model ({', '.join(SIZES)}) or a table ({tables})",
        file=sys.stderr,
    )
    return 2


def scripts() -> dict[str, str]:
    """The modules of this folder that have a `main` with arguments, and the first sentence of each. Imports none."""
    found = {path.stem: _summary(path.stem) for path in sorted(FOLDER.glob("*.py"))}
    return {name: text for name, text in found.items() if text is not None}


def _summary(module: str) -> str | None:
    """The first sentence of a script; None for what is none."""
    path = FOLDER / f"{module}.py"
    if module in ("__main__", "model") or not module.isidentifier() or not path.is_file():
        return None
    tree = ast.parse(path.read_text())
    mains = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    takes_arguments = any(a.arg == "arguments" for n in mains for a in n.args.args)
    return _first_sentence(ast.get_docstring(tree) or "") if takes_arguments else None


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")


def listing() -> str:
    """The models with their sizes and the tables, a line each."""
    from alpa_like.models import SIZES

    found = scripts()
    names = {alias: found[module] for alias, module in ALIASES.items()}
    names |= {name: text for name, text in found.items() if name not in ALIASES.values()}
    width = max(map(len, (*SIZES, *names)))
    models = [f"  {family.ljust(width)}  {', '.join(sizes)}" for family, sizes in SIZES.items()]
    tables = [f"  {name.ljust(width)}  {text}" for name, text in names.items()]
    return "\n".join(["models and their sizes", *models, "", "tables", *tables])


if __name__ == "__main__":
    sys.exit(main())
