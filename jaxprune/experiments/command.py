"""What all commands share: options split at `--`, errors as one message."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with one message where an error is the user's to mend, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
