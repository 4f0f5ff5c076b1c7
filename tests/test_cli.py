"""The command line prints, saves and draws what the API gives; bad input is one sentence and exit code 2."""

import json
import os
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import alpa_like as alpa
from alpa_like import cli

ROOT = Path(__file__).resolve().parent.parent
USERS_FILE = """
    import sys
    from dataclasses import dataclass

    import jax, jax.numpy as jnp, numpy as np
    import alpa_like as alpa
    from alpa_like import models

    assert len(sys.argv) == 1

    @dataclass
    class Sizes:
        width: int = 64

    def train_step(state, batch):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((batch["x"] @ p["w"]) ** 2))(state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), loss

    def example_args():
        width = Sizes().width
        return {"w": jnp.ones((width, width))}, {"x": jax.ShapeDtypeStruct((32, width), jnp.float32)}

    def huge():  # 4 TiB and more, which nobody has
        return {"w": jnp.zeros((2**20, 2**20))}, {"x": jnp.zeros((2**20, 2**20))}

    @alpa.parallelize(method=alpa.ShardParallel(mesh_shape=(2, 4)), static_argnums=2)
    def powered(state, batch, power):
        return state, jnp.sum(batch ** power)

    def powered_args():
        return {"w": np.ones(8, np.float32)}, jnp.ones((16, 8)), 3

    by_hand = alpa.ManualParallel(mesh_shape=(8,), in_specs=(None, jax.sharding.PartitionSpec("x")))
    task = models.small_tasks()["mlp"]
    number = 3

    def needs_key(key):
        return key

    def no_tuple():
        return {}

    def a_text():
        return {"w": "x"}, 0

    def looks():
        return float(jnp.ones(())), 1

    def one():
        return (jnp.ones(3),)

    def broken(state, batch):
        return state["nothing"], batch
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a user in the working directory; plan.json and pipe.json are plans."""
    path = tmp_path_factory.mktemp("user")
    (path / "train.py").write_text(textwrap.dedent(USERS_FILE))
    (path / "raises.py").write_text("def f():\n    return 1 / 0\n\n\nf()\n")
    (path / "syntax.py").write_text("def f(:\n")
    (path / "exits.py").write_text("import sys\nsys.exit(7)\n")
    (path / "imports.py").write_text("import not_installed\n")
    before, paths = os.getcwd(), list(sys.path)
    os.chdir(path)
    alpa.shutdown()
    for options in ("-o plan.json", "-o pipe.json --micro-batches 4 --stages 1"):
        assert cli.main(["plan", "train.py", "--cluster", "dgx-a100", *options.split()]) == 0
    yield path
    os.chdir(before)
    sys.path[:] = paths
    for name in ("train", "planned_train"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(folder, capfd):
    def run(line):
        try:
            code = cli.main(shlex.split(line))
        except SystemExit as exit:
            code = exit.code
        return code, *capfd.readouterr()

    return run


def ours(step="train_step", args=None, method=None, cluster=None):
    """What the API plans for the user's file."""
    module = {"__name__": "theirs"}
    exec(textwrap.dedent(USERS_FILE).replace("assert", "0 and").replace("@dataclass", ""), module)
    step = module[step]
    args = args(module) if args else jax.eval_shape(lambda: (module["example_args"]()[0], {"x": jnp.ones((32, 64))}))
    return alpa.parallelize(step, method=method).plan(*args, cluster=cluster or alpa.Cluster.dgx_a100())


def same(left, right):
    """Equal but for the time that planning took."""
    return replace(left, solver=replace(left.solver, seconds=0)) == replace(
        right, solver=replace(right.solver, seconds=0)
    )


PLANS = {  # options, what the API is told
    "": {},
    "--method Zero2Parallel --cluster p3.16xlarge:2": {
        "method": alpa.Zero2Parallel(),
        "cluster": alpa.Cluster.p3_16xlarge(hosts=2),
    },
    "--cluster dgx-a100:1x4 --mesh 2x2 --memory-budget 1.5MiB": {
        "method": alpa.ShardParallel(mesh_shape=(2, 2), memory_budget_bytes=1.5 * 2**20),
        "cluster": alpa.Cluster.dgx_a100().part(1, 4),
    },
    "--method by_hand": {
        "method": alpa.ManualParallel(mesh_shape=(8,), in_specs=(None, jax.sharding.PartitionSpec("x")))
    },
    "--micro-batches 4 --mesh 8 --schedule gpipe": {
        "method": alpa.PipeshardParallel(
            num_micro_batches=4, schedule="gpipe", stage_option=alpa.UniformStageOption(1, (8,))
        )
    },
}


@pytest.mark.parametrize("options", PLANS)
def test_plan_is_that_of_the_api(run, options):
    cluster = "" if "--cluster" in options else "--cluster dgx-a100"
    code, out, err = run(f"plan train.py {cluster} {options} -o new.json")
    plan = alpa.Plan.load("new.json")
    assert (code, out, err) == (0, f"{plan}\n", "")
    assert same(plan, ours(**PLANS[options]))


def test_a_decorator_says_what_options_leave_open(run):
    code, out, err = run("plan train.py:powered --args powered_args --cluster dgx-a100 -o new.json")
    assert code == 0, err
    assert "mesh (x=2, y=4)" in out
    assert alpa.Plan.load("new.json").function == "powered"
    assert run("plan train.py:powered --args powered_args --cluster dgx-a100 --mesh 8")[1].count("mesh (x=8)") == 1


def test_a_task_brings_its_arguments(run):
    code, out, _ = run("plan train:task --cluster dgx-a100")  # a module, by its dotted name
    assert code == 0
    assert "batch['inputs']" in out


def test_nothing_is_allocated(run):
    code, out, err = run("plan train.py --args huge --cluster dgx-a100:128 --mesh 1024")
    assert code == 0, err
    assert "float32[1048576,1048576]" in out


BAD = {  # what is asked for: words of the sentence
    "plan none.py": ["no file none.py"],
    "plan no.such:step": ["no module 'no.such'"],
    "plan train.py:tran_step": ["no 'tran_step'", "train_step"],
    "plan train.py:number": ["'number'", "int"],
    "plan train.py:Sizes": ["'Sizes'", "class"],
    "plan train.py --args example_arg": ["'example_arg'", "example_args"],
    "plan train.py --args needs_key": ["needs_key", "without arguments", "'key'"],
    "plan train.py --args no_tuple": ["no_tuple", "tuple", "dict"],
    "plan train.py --args a_text": ["a_text", "no array: a value of type"],
    "plan train.py --args one": ["one", "1 arguments", "'batch'"],
    "plan .": ["'.'", "no module", "FILE.py:FUNCTION"],
    "plan ..train:huge": ["'..train'", "no module"],
    "plan ./": ["is a folder"],
    "plan ./plan.json": ["no Python file", "alpa-like show"],
    "plan train.py --cluster dgx": ["'dgx'", "dgx-a100", "p3.16xlarge", "local", "JSON"],
    "plan train.py --cluster dgx-a100:0": ["hosts", "found 0"],
    "plan train.py --cluster dgx-a100:99999999999": ["8e+11 devices", "at most 65536"],
    "plan train.py --cluster dgx-a100:1x9": ["8 devices", "of 9"],
    "plan train.py --cluster none.json": ["none.json", "can't be read"],
    "plan train.py --cluster train.py": ["train.py", "no JSON"],
    "plan train.py --cluster plan.json": ["plan.json", "no cluster"],
    "plan train.py --method fast": ["'fast'", "zero3", "pipeshard"],
    "plan train.py --method data --stages 2": ["--stages", "DataParallel", "pipeshard"],
    "plan train.py --mesh 3x2": ["(3, 2)", "8"],
    "plan train.py --memory-budget 1KiB": ["1.0 KiB", "needed"],
    "plan train.py --mesh 2by4": ["--mesh", "2x4", "'2by4'"],
    "plan train.py --memory-budget much": ["--memory-budget", "12GiB", "'much'"],
    "plan train.py --micro-batches 0": ["--micro-batches", "'0'"],
    "plan train.py -o none/plan.json": ["none/plan.json", "no folder"],
    "plan train.py -o .": ["it is a folder"],
    "plan train.py --view stages": ["--view", "--figure plan.png"],
    "plan train.py --figure plan.txt": ["plan.txt", ".png"],
    "show none.json": ["none.json", "can't be read"],
    "show train.py": ["train.py", "no complete plan"],
    "show plan.json --shardings zebra": ["'zebra'", "state['w']"],
    "show plan.json --trace trace.json": ["no pipeline"],
    "diff plan.json none.json": ["none.json"],
    "clusters --json": ["--json", "name"],
    "clusters dgx": ["'dgx'", "tpu-v4"],
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(run, line):
    cluster = " --cluster dgx-a100" if line.startswith("plan") and "--cluster" not in line else ""
    code, _, err = run(line + cluster)
    sentence = err.splitlines()[-1]
    assert code == 2
    assert "Traceback" not in err
    assert err.startswith("usage") or err.count("\n") == 1
    assert [word for word in BAD[line] if word not in sentence] == [], sentence


THEIRS = {  # what the user's code raises: what is to be seen of it
    "plan raises.py": ['raises.py", line 5', 'raises.py", line 2', "ZeroDivisionError", "raises.py raised"],
    "plan syntax.py": ['syntax.py", line 1', "SyntaxError"],
    "plan imports.py": ["not_installed", "imports.py raised ModuleNotFoundError"],
    "plan exits.py": ["exit code 7", "__main__"],
    "plan train.py --args looks": ["in looks", "looks of train.py raised", "traced"],
    "plan train.py:broken": ["in broken", "KeyError: 'nothing'", "broken of train.py raised"],
}


@pytest.mark.parametrize("line", THEIRS)
def test_errors_of_the_users_code_are_shown_without_ours(run, line):
    code, out, err = run(f"{line} --cluster dgx-a100")
    assert (code, out) == (2, "")
    assert [word for word in THEIRS[line] if word not in err] == [], err
    assert "cli" not in "".join(part for part in err.splitlines() if part.startswith("  File"))


def test_a_file_without_arguments_is_told_how_to_give_them(run, folder):
    (folder / "bare.py").write_text("def train_step(state, batch):\n    return state, batch\n")
    code, _, err = run("plan bare.py --cluster dgx-a100")
    assert code == 2
    assert "example_args()" in err
    assert "--args" in err


def test_show_prints_and_draws(run, folder):
    plan = alpa.Plan.load("pipe.json")
    assert run("show pipe.json --figure step.png --view timeline --trace trace.json") == (0, f"{plan}\n", "")
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "trace.json").read_text())


def test_shardings_are_those_of_the_plan(run):
    plan = alpa.Plan.load("plan.json")
    rows = run("show plan.json --shardings")[1].splitlines()[1:]
    inside = {placed.path for placed in plan.stages[0].activations}
    assert {row.split("  ")[0] for row in rows} == {*plan.shardings, *inside}
    (row,) = run('show plan.json --shardings "?tate[\'w*"')[1].splitlines()[1:]
    assert str(plan.shardings["state['w']"]).replace("PartitionSpec", "P") in row
    assert len(run("show plan.json --shardings tate[")[1].splitlines()) == 2


def test_diff_speaks_by_its_exit_code(run, folder):
    assert run("diff plan.json plan.json") == (0, "", "")
    code, out, _ = run("diff plan.json pipe.json --figure both.png")
    assert (code, out.strip()) == (1, alpa.Plan.load("plan.json").diff(alpa.Plan.load("pipe.json")))
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")


def test_clusters_are_listed_and_written_out_to_be_edited(run, folder):
    out = run("clusters")[1]
    assert all(name in out for name in alpa.Cluster.presets())
    assert all(source in run("clusters tpu-v5e")[1] for source in alpa.Cluster.tpu_v5e().sources)
    data = json.loads(run("clusters dgx-h100:4 --json")[1])
    assert alpa.Cluster.from_json(data) == alpa.Cluster.dgx_h100(hosts=4)
    (folder / "mine.json").write_text(json.dumps({**data, "name": "mine"}))
    assert cli.read_cluster("mine.json:2") == replace(alpa.Cluster.dgx_h100(hosts=2), name="mine")


def test_local_are_the_devices_here(monkeypatch):
    monkeypatch.setattr(alpa.Cluster, "local", lambda: alpa.Cluster.dgx_h200())
    assert cli.read_cluster("local:1x2") == alpa.Cluster.dgx_h200().part(1, 2)


def test_a_reader_that_closes_early_is_no_error(folder):
    program = f"{sys.executable} -m alpa_like show {folder}/pipe.json --shardings; echo code $? >&2"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, shell=True, cwd=ROOT, **pipes) as shell:
        shell.stdout.close()
        assert shell.stderr.read() == "code 141\n"


@pytest.mark.parametrize(
    ("stdout", "said"), [(">&-", "code 0\n"), ("> /dev/full", "the output can't be written: No space left on device")]
)
def test_an_output_that_takes_nothing_is_no_traceback(folder, stdout, said):
    program = f"{sys.executable} -m alpa_like show {folder}/pipe.json {stdout}; echo code $? >&2"
    error = subprocess.run(program, shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True).stderr
    assert said in error
    assert len(error.splitlines()) == 1 + ("full" in stdout)


def test_the_command_is_installed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["alpa-like"].split(":")
    assert getattr(sys.modules[module], name) is cli.main


@pytest.mark.parametrize("command", ["plan", "show", "diff", "clusters"])
def test_help_has_an_example_that_can_be_read(command, run):
    code, out, _ = run(f"{command} --help")
    assert code == 0
    assert f"alpa-like {command}" in out.split("\nexample")[1]
