"""Runs the code cells of a notebook, one after the other, as Jupyter does: `python notebook_worker.py FILE.ipynb`.

What the last line of a cell evaluates to is shown, so that its pictures are drawn. A cell that fails ends the process
with its own traceback, which names the cell. With `--times`, CPU seconds per cell go to stderr.
"""

import ast
import json
import sys
import time
import types

# What Jupyter asks a value for.
REPRS = ("_repr_html_", "_repr_png_")


def show(value):
    if value is not None:
        shown = [getattr(value, name)() for name in REPRS if hasattr(value, name)]
        print(repr(value)[:200], *(f"{len(s)} bytes" for s in shown if s))


def run_cell(source, name, namespace):
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is not None:
        show(eval(compile(ast.Expression(last.value), name, "eval"), namespace))


def main(path, *options):
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    with open(path, encoding="utf-8") as file:
        cells = [c for c in json.load(file)["cells"] if c["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        before = time.process_time()
        run_cell("".join(cell["source"]), f"<cell {number} of {path}>", vars(module))
        if "--times" in options:
            print(f"cell {number}: {time.process_time() - before:.1f} s of CPU", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
