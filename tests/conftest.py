"""Eight emulated CPU devices for every test, set up before JAX starts a backend."""

import os

# XLA's CPU thread pool starves, and collectives deadlock, when it has fewer threads than queued device programs.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
