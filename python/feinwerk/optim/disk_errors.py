"""The errors of optimizer states on disk: one base, one class for each thing a caller can do."""

from __future__ import annotations

import os
from pathlib import Path


class OffloadError(RuntimeError):
    """States on disk cannot be used: the base of all that follows, and what a failing disk raises.

    With an error of the operating system as its cause the disk itself failed (full, read-only,
    input/output error); the last committed generation is as it was.
    """


class StatesInUse(OffloadError):
    """Another process, or another object of this one, has the directory open.

    Attributes:
        directory: the offload directory.
        owner: what its lock file says of the owner.
    """

    def __init__(self, directory: Path, owner: str) -> None:
        """See the class."""
        super().__init__(f"DiskStates: directory must be used by one process, got {owner}")
        self.directory, self.owner = directory, owner

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by the arguments: these errors travel between processes."""
        return type(self), (self.directory, self.owner)


class IncompleteStates(OffloadError):
    """The directory has no complete generation: no step was ever committed in it.

    Attributes:
        file: the generation file that is missing.
    """

    def __init__(self, file: Path) -> None:
        """See the class."""
        super().__init__(
            f"DiskStates: directory must hold a complete generation, got no {file.name!r} file in "
            f"{os.fspath(file.parent)!r}"
        )
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by the arguments: these errors travel between processes."""
        return type(self), (self.file,)


class ForeignStates(OffloadError):
    """A file belongs to another layout, rank or program.

    Attributes:
        file: which file.
        rule: what it must be.
        got: what it is.
    """

    def __init__(self, file: Path, rule: str, got: object) -> None:
        """See the class."""
        super().__init__(f"DiskStates: {os.fspath(file)!r} must {rule}, got {got}")
        self.file, self.rule, self.got = file, rule, str(got)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by the arguments: these errors travel between processes."""
        return type(self), (self.file, self.rule, self.got)


class CorruptStates(OffloadError):
    """A file is torn, short or changed.

    Attributes:
        file: which file.
        bucket: which record of it, or None where it is the file as a whole.
        rule: what it must be.
        got: what it is.
    """

    def __init__(self, file: Path, bucket: int | None, rule: str, got: object) -> None:
        """See the class."""
        where = "" if bucket is None else f" bucket {bucket}"
        super().__init__(f"DiskStates: {os.fspath(file)!r}{where} must {rule}, got {got}")
        self.file, self.bucket, self.rule, self.got = file, bucket, rule, str(got)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by the arguments: these errors travel between processes."""
        return type(self), (self.file, self.bucket, self.rule, self.got)
