"""The settings as a command reads them: a wrong environment variable is the user's to repair."""

from pydantic import ValidationError

from lookalike_platform import settings
from lookalike_platform.errors import FieldProblem, InvalidRequest, LookalikeError


def read_settings() -> settings.Settings:
    """This process's settings.

    Raises:
        InvalidRequest: an environment variable has a value that cannot be.
        LookalikeError: the home folder cannot be made.
    """
    try:
        return settings.get_settings()
    except ValidationError as error:
        raise InvalidRequest(
            "The environment holds settings that cannot be used.",
            [
                FieldProblem(f"LOOKALIKE_{'_'.join(map(str, e['loc'])).upper()}", e["msg"])
                for e in error.errors()
            ],
        ) from None
    except OSError as error:
        raise LookalikeError(
            f"Cannot use {error.filename} as home ({error.strerror}): "
            "set LOOKALIKE_HOME to a folder that may be written to."
        ) from error
