"""Errors that a user can cause. Each is one line that names the thing and says what to do.

The command line turns them into exit code 2, the server into a 4xx. Everything else is a bug and keeps
its traceback.
"""


class FathomError(Exception):
    """Base of all errors caused by what a user handed in; `str(error)` is one complete line.

    Where a run has many processes, `shared`: all of them meet the error at the same point; `told`: another one says it.
    """

    shared = told = False


class ConfigError(FathomError, ValueError):
    """A model config whose fields are unknown, missing, of the wrong type or out of range."""


class RecipeError(FathomError, ValueError):
    """A training recipe or a `--set` override that cannot be used."""


class CheckpointError(FathomError):
    """A checkpoint that cannot be read or written: missing, misshapen, truncated, no space."""


class DataError(FathomError):
    """A corpus or dataset that cannot be read, or holds nothing to train on."""


class InputError(FathomError, ValueError):
    """Token ids, prompts or sampling settings that the model cannot take."""


class ChatFormatError(FathomError, ValueError):
    """Messages that cannot be encoded, or generated text that breaks the chat format."""


class QueueFull(FathomError):
    """More requests than the engine's queue holds; try again later."""
