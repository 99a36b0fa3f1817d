"""Freed memory is kept: counted in page faults, in processes of their own, since the setting lasts as long as one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

# As a training step does: several arrays at a time, of sizes that glibc would map, freed before the next round.
PROGRAM = """
import resource, sys
import numpy as np
from steelyard.memory import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
else:
    print(None)
def step():
    arrays = [np.ones(n, dtype=np.float32) for n in (4_000_000, 6_000_000, 40_000_000)]
    return sum(float(a[0]) for a in arrays)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def ran(mode: str, **extra: str) -> tuple[str, int]:
    """What `keep_freed_memory` said, and the page faults of five steps."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", PROGRAM, mode]
    made = subprocess.run(command, env=clean | extra, capture_output=True, text=True, check=True)
    said, faults = made.stdout.split()
    return said, int(faults)


def test_the_next_step_takes_the_same_pages() -> None:
    said, faults = ran("keep")
    if platform.libc_ver()[0] != "glibc":
        assert said == "False"
        return
    assert said == "True"
    _, otherwise = ran("leave")
    # 5 x 200 MB in pages of 4 KiB are 244,000; where the system has larger ones, fewer.
    assert faults < otherwise / 10


def test_settings_of_the_users_own_stay() -> None:
    assert ran("keep", MALLOC_MMAP_THRESHOLD_="131072")[0] == "False"
    assert ran("keep", GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")[0] == "False"
