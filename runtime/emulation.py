"""How many CPU devices are emulated where nobody says it, and how many threads they need."""

from __future__ import annotations

__all__ = ["EMULATED_DEVICES", "threads_for"]

EMULATED_DEVICES = 8
_THREADS_PER_DEVICE = 2


def threads_for(devices: int) -> str:
    """NPROC for so many CPU devices; it has to be in the environment before JAX starts.

    XLA's CPU backend starves at a rendezvous when it has fewer threads than programs in flight need: one per device,
    and a few for what they wait for. More than two per device only take turns on the cores, and steps take longer.
    """
    return str(_THREADS_PER_DEVICE * max(devices, EMULATED_DEVICES))
