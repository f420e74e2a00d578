"""The errors of this package, beside `TypeError` and `ValueError` for bad arguments."""


class PruMergeError(Exception):
    """Base of the errors that only this package raises."""


class UnsupportedModelError(PruMergeError, TypeError):
    """The object given to `patch` is no model of a supported family."""


class BackendUnavailableError(PruMergeError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class InputError(PruMergeError, ValueError):
    """Bad input: its message is one line that names the argument, what was expected and what came.

    The commands end with exit code 2 on it.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))  # messages of libraries have many lines


class PictureError(InputError):
    """A picture that cannot be used; of many, the others can.

    Its message is `image: ` (or `video: `) and what was expected and what came.
    """

    def __init__(self, says: object, modality: str = "image") -> None:
        super().__init__(f"{modality}: {says}")
        self.says = str(self).removeprefix(f"{modality}: ")
