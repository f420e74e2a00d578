"""The errors of this package, beside `TypeError` and `ValueError` for bad arguments."""


class PruMergeError(Exception):
    """Base of the errors that only this package raises."""


class UnsupportedModelError(PruMergeError, TypeError):
    """The object given to `patch` is no model of a supported family."""


class BackendUnavailableError(PruMergeError, RuntimeError):
    """A backend was asked for by name and cannot run here."""
