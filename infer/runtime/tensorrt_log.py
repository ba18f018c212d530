"""TensorRT's messages, kept for the error that needs them instead of written to the terminal."""

from __future__ import annotations

from typing import Any


def make_logger(trt: Any, messages: list[str]) -> Any:
    """A logger that appends warnings and errors to `messages`, the latest last.

    Args:
        trt: the library, `tensorrt` or `tensorrt_rtx`.
        messages: receives one line a message.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                messages.append(" ".join(message.split()))

    return Logger()
