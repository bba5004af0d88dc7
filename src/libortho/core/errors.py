"""Errors that callers can tell apart.

Every message says what was given, what was expected and what to do.
"""


class LibOrthoError(Exception):
    """Base class of all errors raised on purpose by this library."""


class ConfigError(LibOrthoError, ValueError):
    """A configuration field has a value outside its domain."""


class TargetError(LibOrthoError, ValueError):
    """The requested modules do not exist or cannot be split."""


class DataError(LibOrthoError, ValueError):
    """A record is malformed, empty or too long; the message names the record."""


class AlphaError(LibOrthoError, ValueError):
    """The switch was given a value that it cannot take."""


class AlphaContextError(LibOrthoError, RuntimeError):
    """A forward pass cannot tell which alpha it should run under, so it refuses to run."""


class CheckpointError(LibOrthoError, RuntimeError):
    """A directory on disk is not a complete, consistent split model."""


class KernelError(LibOrthoError, RuntimeError):
    """The optional C++ kernels cannot be built or loaded here."""
