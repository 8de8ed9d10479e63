"""The memory of this process: how much there is, and what glibc does with what was freed. Elsewhere
than on Linux, little of it works.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

# From malloc.h. Settings by hand also end glibc's own moving of the thresholds.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def resident_bytes() -> int:
    """The memory that this process holds now; where the system does not tell, the most it ever
    held.
    """
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep() -> None:
    """Arrays of a few MB, made anew for each block, use the memory of the last ones: else each is
    mapped, zeroed page by page and unmapped, which is a tenth of the work. At most 64 MiB are kept
    so (mallopt(3)).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def give_back() -> None:
    """What was freed goes back to the system; glibc would keep much of it (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
