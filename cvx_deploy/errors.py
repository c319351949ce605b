"""Every failure this package states, as one tree.

::

    CvxError                   base: says what went wrong, where, and how to mend it
    ├── CheckpointError        a checkpoint folder, config, shard or tensor is missing or damaged
    │   └── WrongModelError    a healthy checkpoint, but of another model
    ├── ShapeError             a height, width or frame count the model cannot do
    ├── BundleError            a bundle file is missing, truncated, altered, foreign, or points outside
    ├── MediaError             an image or video that cannot be read or written
    ├── PromptError            a prompt, or a combination of prompts and inputs, that makes no sense
    ├── RecipeError            a precision that does not exist, or that a network cannot have
    ├── CalibrationError       a calibration table that is missing, damaged, or of another model or shape
    ├── OutputError            a place that cannot be written, or that another process is writing
    ├── ParityError            results that are further from eager PyTorch than their precision explains
    └── EngineError            an engine that is not installed, or cannot run this bundle
        └── OutOfMemoryError   the device has less memory than the engines need

The command line prints one as ``error: <what>. fix: <how>.`` and exits with 1.
"""


class CvxError(Exception):
    """A stated failure.

    Args:
        what: What went wrong and where, one plain sentence without a full stop at its end.
        fix: How to mend it, likewise.
    """

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(what)
        self.what = what.rstrip(".")
        self.fix = fix.rstrip(".")

    def __str__(self) -> str:
        return f"{self.what}. fix: {self.fix}."


class CheckpointError(CvxError):
    """A checkpoint folder, config, shard or tensor is missing or damaged."""


class WrongModelError(CheckpointError):
    """The checkpoint is whole, but it is another model's."""


class ShapeError(CvxError):
    """A height, width or frame count that the model cannot do."""


class BundleError(CvxError):
    """A bundle file is missing, truncated, altered, foreign, or lies outside the bundle."""


class MediaError(CvxError):
    """An image or video that cannot be read or written."""


class PromptError(CvxError):
    """A prompt, or a combination of prompts and inputs, that makes no sense."""


class RecipeError(CvxError):
    """A precision that does not exist, or that a network cannot have."""


class CalibrationError(CvxError):
    """A calibration table that is missing, damaged, of another model or shape, or that holds what is no number."""


class OutputError(CvxError):
    """A place that cannot be written, or that another process is writing."""


class ParityError(CvxError):
    """Results that are further from eager PyTorch than their precision explains."""


class EngineError(CvxError):
    """An engine that is not installed, or cannot run this bundle."""


class OutOfMemoryError(EngineError):
    """The device has less memory than the engines need, or than they were allowed."""
