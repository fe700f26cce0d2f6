"""A disk without room, as far as files that grow can tell."""

import resource
from contextlib import contextmanager


@contextmanager
def no_room(nbytes):
    """No file grows beyond so many bytes inside the block; Python ignores the signal of that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
