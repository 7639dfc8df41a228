"""What can be wrong with a checkpoint, each as a type of its own with the facts as attributes."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(RuntimeError):
    """Saving or loading failed; the message says on which rank and why.

    Raised on every rank when one of them fails. After a failed save the checkpoints that were
    there before are intact and training can go on; a dead or silent peer is no CheckpointError but
    `feinwerk.optim.PeerFailure` or `PhaseTimeout`, because then training cannot.

    Attributes:
        partly_loaded: whether model and optimizer have been changed in part, by a load that
            failed after everything had been verified.
    """

    partly_loaded = False

    def __str__(self) -> str:
        """Say what happened, and whether it left a mess."""
        mess = "; model and optimizer are partly loaded" if self.partly_loaded else ""
        return super().__str__() + mess


class IncompleteCheckpoint(CheckpointError):
    """A directory is no complete checkpoint: it has no manifest, or one that breaks its rules.

    Attributes:
        path: the directory.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        """Say which directory is meant."""
        self.path, self.reason = path, reason
        super().__init__(f"{path} is no complete checkpoint: {reason}")

    def __reduce__(self) -> tuple[type[IncompleteCheckpoint], tuple[str, str]]:
        """Travel between ranks with all attributes."""
        return type(self), (self.path, self.reason)


class CorruptShard(CheckpointError):
    """A file does not hold what was written to it.

    Attributes:
        file: its path.
        parameter: the tensor whose bytes are damaged, as `model.<name>` or
            `optimizer.<name>.<state>`; the first one where a whole file is missing; None for
            the manifest and DCP's `.metadata`.
        rank: the rank that wrote the file.
        reason: what was found instead.
    """

    def __init__(self, file: str, parameter: str | None, rank: int, reason: str) -> None:
        """Name the file, the tensor and the writer."""
        self.file, self.parameter, self.rank, self.reason = file, parameter, rank, reason
        what = "" if parameter is None else f", {parameter}"
        super().__init__(f"{file}{what} (written by rank {rank}): {reason}")

    def __reduce__(self) -> tuple[type[CorruptShard], tuple[str, str | None, int, str]]:
        """Travel between ranks with all attributes."""
        return type(self), (self.file, self.parameter, self.rank, self.reason)


class MismatchedCheckpoint(CheckpointError):
    """The checkpoint is intact, but not one of this model and optimizer.

    Attributes:
        path: the checkpoint.
        missing: what model and optimizer need and the checkpoint does not have.
        unexpected: what the checkpoint has and model and optimizer do not.
        different: one line for each shape, dtype or option that differs.
    """

    def __init__(
        self,
        path: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        different: Sequence[str] = (),
    ) -> None:
        """List every difference."""
        self.path = path
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        self.different = tuple(different)
        parts = [f"{path} is a checkpoint of another model or optimizer"]
        for title, names in (
            ("missing in the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
            ("different", self.different),
        ):
            if names:
                parts.append(f"{title}: {', '.join(names)}")
        super().__init__("; ".join(parts))

    def __reduce__(
        self,
    ) -> tuple[
        type[MismatchedCheckpoint],
        tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]],
    ]:
        """Travel between ranks with all attributes."""
        return type(self), (self.path, self.missing, self.unexpected, self.different)
