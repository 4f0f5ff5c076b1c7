"""One exception class per layer, so that a caller can tell whose assumption failed.

Every message says what was expected, what was found, where, and what to do next.
"""


class AlpaError(Exception):
    """Base of all errors that this package raises on purpose."""


class ClusterError(AlpaError, ValueError):
    """A description of a machine is impossible, or does not match the devices that are here."""


class TraceError(AlpaError, TypeError):
    """The function or its arguments can't be traced as one train step."""


class GraphError(AlpaError, ValueError):
    """A traced program has a form that the operator graph can't describe."""


class PlanError(AlpaError, ValueError):
    """A plan breaks one of its rules, or belongs to another program, cluster or version."""


class MethodError(AlpaError, ValueError):
    """An option of a parallel method is wrong, or does not fit the devices or the arguments."""


class SolverError(AlpaError, RuntimeError):
    """The solver found no plan in the time it had, or could not be run."""


class InfeasibleError(PlanError):
    """No plan meets the memory budget."""


class ProgramError(AlpaError, RuntimeError):
    """A compiled step failed, or was called with arguments that it was not compiled for."""


class CheckpointError(AlpaError, RuntimeError):
    """A checkpoint could not be written, is missing or broken, or holds the state of another model."""


class WorkerError(AlpaError, RuntimeError):
    """A process of a cluster died, did not answer in time, or failed in what it was asked to do."""


class CommandError(AlpaError, ValueError):
    """The command line names something that is not there or can't be used."""
