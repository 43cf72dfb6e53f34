"""The one exception users see: a single clear line that says what, where, and what to do instead."""


class LightPeftError(ValueError):
    """Bad input or an impossible request; `str(error)` is one line meant for the user."""


def require(condition: object, message: str) -> None:
    """Raise `LightPeftError(message)` unless `condition` holds."""
    if not condition:
        raise LightPeftError(message)
