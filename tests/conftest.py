"""Eight emulated CPU devices for every test, set up before JAX starts a backend."""

import os
import signal

# XLA's CPU thread pool starves, and collectives deadlock, when it has fewer threads than queued device programs.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Ray reads this when it is imported. It means: this machine only, so that all is on 127.0.0.1.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import jax

jax.config.update("jax_num_cpu_devices", 8)

# A shell that starts pytest in the background lets it ignore Ctrl-C, and so would all processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
