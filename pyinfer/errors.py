"""Every exception that pyinfer raises on purpose: where, what was found, what was expected, what to do."""


class PyInferError(Exception):
    """Base of all errors that a caller may want to show to a person as one sentence."""


class FormatError(PyInferError, ValueError):
    """A file does not say what its format promises: file, place, found, expected."""


class UnsupportedError(PyInferError):
    """A file or request is well formed, but asks for something that pyinfer does not have; names what it
    has.
    """


class InputError(PyInferError, ValueError):
    """An argument of the caller is out of range or contradicts another."""


class ContextFullError(PyInferError):
    """The tokens do not fit the context; says how many fit."""


class ModelNotFoundError(PyInferError, FileNotFoundError):
    """No such file or registered model, or it cannot be fetched now."""


class CapacityError(PyInferError, MemoryError):
    """Memory or disk does not suffice; says how much is needed and how much there is."""


class MissingExtraError(PyInferError, ImportError):
    """An optional package is missing; names the pip command."""
