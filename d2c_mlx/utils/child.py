"""Python in a child process with bounds, for what files of strangers ask of a program."""

import sys


def bounded(code: str, seconds: int, nbytes: int) -> list[str]:
    """The command of a Python process that may take so many seconds of a core, and on Linux bytes.

    Beyond them it is killed, or ends with an error. Only the caller can bound how long it waits.
    """
    limits = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, ({nbytes}, {nbytes}))
"""
    return [sys.executable, "-I", "-c", limits + code]
