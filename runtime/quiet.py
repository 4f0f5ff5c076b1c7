"""Calling libraries that log through absl, as Orbax does, so that nothing of it shows and nothing of it stays."""

from __future__ import annotations

import logging
from pathlib import Path

from absl import logging as absl_logging

__all__ = ["Quiet"]


class _Placeholder(logging.Handler):
    """Stands in for no handler at all: absl gives the root logger one of its own where it finds none."""

    def emit(self, record: logging.LogRecord) -> None:
        last = logging.lastResort
        alone = all(isinstance(h, _Placeholder) for h in logging.root.handlers) and logging.root.handlers[0] is self
        if alone and last is not None and record.levelno >= last.level:
            last.handle(record)


class Quiet(logging.Filter):
    """While in force, what `library` logs through absl is dropped, whatever the level; its errors are raised anyway.

    A context manager; after `keep` it stays in force when the block ends, until a second block with it ends.
    """

    def __init__(self, library: str) -> None:
        super().__init__()
        self._library = library
        self._placeholder = _Placeholder()
        self._keep = False

    def keep(self) -> None:
        """Stay in force after the block."""
        self._keep = True

    def __enter__(self) -> Quiet:
        self._keep = False
        absl_logging.get_absl_logger().addFilter(self)
        logging.root.addHandler(self._placeholder)
        return self

    def __exit__(self, *error: object) -> None:
        if not self._keep:
            absl_logging.get_absl_logger().removeFilter(self)
            logging.root.removeHandler(self._placeholder)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._library not in Path(record.pathname).parts
