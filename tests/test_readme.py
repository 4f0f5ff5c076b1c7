"""README's first program runs, and prints what README shows."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def block(language):
    """The first fenced block in a language."""
    return re.search(rf"^```{language}\n(.*?)^```", README, re.M | re.S)[1]


def timeless(line):
    """Without how long solving took."""
    return re.sub(r"[\d.]+ m?s$", "", line) if line.startswith("solver") else line


def test_the_first_program_prints_what_is_shown(measured_here, capsys):
    exec(compile(block("python"), "README.md", "exec"), {"__name__": "readme"})
    printed, shown = capsys.readouterr().out.splitlines(), block("text").splitlines()
    left_out = shown.index("  ...")
    assert [timeless(line) for line in printed[:left_out]] == [timeless(line) for line in shown[:left_out]]
    losses = [[float(x) for x in lines[-3:]] for lines in (printed, shown)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
