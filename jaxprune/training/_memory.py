"""Memory of the process: pages that a step has freed are kept for the next one."""

import ctypes
import mmap
import os
import sys

__all__ = ["keep_memory"]

# Parameters of `mallopt`, from malloc.h of the GNU C library.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER = -1  # a limit to what may be free at the end of the heap that is never reached
_MORE = 64 * 2**20  # bytes that the heap grows by
_HUGE = 2 * 2**20  # bytes of a huge page


def keep_memory(*, huge_pages: bool = True) -> bool:
    """Makes the C library keep memory that is freed; a step on a CPU then takes less time.

    XLA allocates the buffers of a step anew each time. The GNU C library takes large ones from the
    system and gives them back when they are freed, and the system clears every page again at its
    first use. That is up to half of the time of a step whose arithmetic is cheap, such as one with
    removed channels or sparse kernels. After this call pages remain in the process.

    Call it once, before the first computation. The process holds the most memory that it has ever
    used. All commands of `scripts/` call it; accelerators have their own allocators, which it does
    not change.

    Args:
        huge_pages: whether to ask the system for pages of 2 MiB. Steps of narrow networks and of
            sparse kernels then take up to a tenth less time, and a process up to a fifth more
            memory. It does nothing beyond half of the machine's memory, or if Linux gives no such
            pages (`never` in /sys/kernel/mm/transparent_hugepage/enabled).

    Returns:
        Whether it was done: True with the GNU C library on Linux, False elsewhere, where nothing
        changes.

    Example:
        >>> from jaxprune import training
        >>> training.keep_memory() in (True, False)
        True
    """
    if sys.platform != "linux":
        return False
    try:
        library = ctypes.CDLL(None)
        mallopt, _ = library.mallopt, library.gnu_get_libc_version
    except (AttributeError, OSError):  # another C library
        return False
    settings = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _MORE), (_ARENA_MAX, 1)
    done = all([mallopt(parameter, value) == 1 for parameter, value in settings])
    if huge_pages:
        _use_huge_pages(library)
    return done


def _use_huge_pages(library: ctypes.CDLL) -> None:
    """Makes the heap grow, by addresses alone, and asks for huge pages where it has grown to.

    Does nothing where the system refuses. What a process needs beyond has pages of the usual size.
    """
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    start = library.malloc(size)
    if start is None:
        return
    library.free(start)  # to the end of the heap, where it stays
    first = -(-start // _HUGE) * _HUGE
    library.madvise(first, (start + size - first) // _HUGE * _HUGE, mmap.MADV_HUGEPAGE)
