"""What bad input must be answered with."""

from contextlib import contextmanager

import pytest

from kvpress import PolicyError


@contextmanager
def refused(*words, error=PolicyError):
    """The block raises `error` with a message of one line that has all the words."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert len(message) > 20 and "\n" not in message
