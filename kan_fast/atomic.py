"""Files that are there whole or not at all."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end: whole or not at all, whatever interrupts.

    Errors of the file system name `path`.
    """
    target = Path(path)
    if not target.name:
        raise ValueError(f"path: expected that of a file, got {os.fspath(path)!r}")
    partial = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == os.fspath(partial):
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
        raise
