"""The errors that a user can act on. Each carries the exit code of the command line."""

EXIT_SOME_UNREADABLE = 3
"""Exit code of a command that finished, but could not read some of its inputs. No exception raises it."""


class UserError(ValueError):
    """Wrong use: a bad option, a missing folder, a checkpoint of another model. One line, with what to do."""

    exit_code = 2


class CorruptFileError(RuntimeError):
    """A damaged or changed file of ours: its hash, size or structure is not the one that was written."""

    exit_code = 1


class SaveError(RuntimeError):
    """A result could not be written: a full disk, most often. An earlier version of it is untouched."""

    exit_code = 1


class WorkerError(RuntimeError):
    """A worker process ended before its work did."""

    exit_code = 1


class InterruptedRunError(RuntimeError):
    """A signal stopped training, and the state is saved: `--resume auto` resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class RankLostError(RuntimeError):
    """Another rank did not join a collective: it died, or hangs. `--max-restarts` restarts all ranks."""

    exit_code = 1


class DivergedError(RuntimeError):
    """Training has diverged: the loss is not a number any more, or does not move."""

    exit_code = 1


class GateError(RuntimeError):
    """An exported model does not agree with its checkpoint, and is therefore not shipped."""

    exit_code = 4


class ImageError(Exception):
    """One file cannot be decoded. The message is the reason, without the file's name."""
