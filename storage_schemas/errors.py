"""Errors a user can mend: each says what was found, where, what was expected and how to mend it."""

from __future__ import annotations

import errno
from functools import partial

DISK_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of the disk is used up"}


class InputError(ValueError):
    """Something the user gave (a file, a table, a name, a setting) is not usable as it is."""


class SchemaError(InputError):
    """A file on disk does not have the form that :mod:`storage_schemas` gives it.

    Args:
        path: where the offending file or folder lies (path or URL).
        problem: what was found and what was expected.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem

    def __reduce__(self) -> tuple[type[SchemaError], tuple[str, str]]:
        # The default pickles args=(message,), which does not fit __init__; errors cross Ray processes.
        return type(self), (self.path, self.problem)


class StoreError(InputError):
    """A store or disk that does not answer, refuses for now, or is full: no fault of the data, and to be tried again.

    Args:
        path: what was to be read or written (path or URL).
        problem: what the store said.
        lasting: whether waiting alone does not help, as where a disk is full or access is denied.
    """

    def __init__(self, path: str, problem: str, *, lasting: bool = False) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem
        self.lasting = lasting

    def __reduce__(self) -> tuple[partial[StoreError], tuple[str, str]]:
        return partial(type(self), lasting=self.lasting), (self.path, self.problem)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a disk, or what a user may have of it, is used up; an error may say so by what it was raised from."""
    if error is None:
        return False
    return (isinstance(error, OSError) and error.errno in DISK_FULL) or is_disk_full(error.__cause__)
