"""The failures that a user can act on. Each carries the exit code that the command line answers with."""

EXIT_SOME_UNREADABLE = 3
"""Exit code of a command that finished, but could not read some of its inputs. No exception raises it."""


class UserError(ValueError):
    """Wrong use: a bad option, a missing folder, a checkpoint of another model. One line, says what to do."""

    exit_code = 2


class CorruptFileError(RuntimeError):
    """A file of ours that is damaged or was changed: its hash, size or structure is not what was written."""

    exit_code = 1


class SaveError(RuntimeError):
    """A result that could not be written: a full disk, most often. What was there before is untouched."""

    exit_code = 1


class WorkerError(RuntimeError):
    """A process that worked for this one ended before its work did."""

    exit_code = 1


class InterruptedRunError(RuntimeError):
    """Training that was asked to stop, and did so with its state saved: `--resume auto` goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class RankLostError(RuntimeError):
    """Another rank did not join a collective: it died, or hangs. `--max-restarts` starts all ranks again."""

    exit_code = 1


class DivergedError(RuntimeError):
    """Training that can only waste time from here on: the loss is no longer a number, or learns nothing."""

    exit_code = 1


class GateError(RuntimeError):
    """An exported model that does not agree with its checkpoint, and is therefore not shipped."""

    exit_code = 4


class ImageError(Exception):
    """One file that cannot become an image. The message is the reason, without the file's name."""
