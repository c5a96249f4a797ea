"""Python reads this when it starts: the wall clock is ahead by as many seconds as the file CLOCK_OFFSET says."""

import os
import time
from pathlib import Path

_time, _file = time.time, Path(os.environ["CLOCK_OFFSET"])


def _jumped() -> float:
    return _time() + float(_file.read_text())


time.time = _jumped
time.time_ns = lambda: int(_jumped() * 1e9)
