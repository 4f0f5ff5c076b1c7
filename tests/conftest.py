"""Eight emulated CPU devices for every test, set up before JAX starts a backend."""

import os
import signal
from importlib.metadata import version

# XLA's CPU thread pool starves, and collectives deadlock, when it has fewer threads than queued device programs.
os.environ.setdefault("NPROC", "16")  # as `alpa.init` has it
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Ray reads this when it is imported. It means: this machine only, so that all is on 127.0.0.1.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import jax
import pytest

QUICK = {
    "0.10.": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_use_fusion_emitters=false",
    "0.12.": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
}
"""By version of jaxlib, what lets XLA write CPU code in a fraction of the time, also in processes that tests start.

How a program is partitioned and what it sends are decided before. On a flag that it does not know XLA ends the process.
"""

jax.config.update("jax_num_cpu_devices", 8)
quick = [flags for prefix, flags in QUICK.items() if version("jaxlib").startswith(prefix)]
os.environ["XLA_FLAGS"] = " ".join([*quick, *os.environ.get("XLA_FLAGS", "").split()])

# A shell that starts pytest in the background lets it ignore Ctrl-C, and so would all processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def figures(tmp_path_factory):
    """The folder where `Cluster.local()` keeps what it measures; by few runs, since tests need no good figures.

    What is measured under the flags above is not for the user's programs.
    """
    from alpa_like import profiling

    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPA_LIKE_CACHE_DIR", str(folder))
        patch.setattr(profiling, "_PAIRS", 1)
        patch.setattr(profiling, "_TYPICAL_RUNS", 2)
        yield folder


@pytest.fixture(scope="session")
def measured_here(figures):
    """The same folder, after all devices were measured."""
    from alpa_like import Cluster

    Cluster.local()
    return figures
