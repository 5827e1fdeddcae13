"""What malloc does with the memory that a training step frees.

glibc gives large blocks back to the system at once and asks for them again a moment later. The
system then clears every page once more, 4 KiB by 4 KiB: a training step on a CPU meets thousands of
such page faults, and on a virtual machine they took up to a fifth of its time. A step reaches the
peak anyway, so that kept blocks cost little beyond it.
"""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt(3), and what a process that never called it ends up with once it has freed
# a block of 32 MiB: glibc moves its thresholds up to there by itself, and stops to when it is told.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_NEVER = -1
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: 64 * 2**20}
_USUAL = {
    _MMAP_MAX: 2**16,
    _MMAP_THRESHOLD: 32 * 2**20,
    _TRIM_THRESHOLD: 64 * 2**20,
    _TOP_PAD: 128 * 2**10,
}


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its own next allocation.

    Returns:
        Whether glibc accepted it; False without glibc, where nothing changes.
    """
    return _set(_KEEP)


def usual_memory() -> bool:
    """Undo `keep_freed_memory`, and give back what is free: for those who measure both.

    Returns:
        As `keep_freed_memory`.
    """
    return _set(_USUAL) and give_back()


def give_back() -> bool:
    """Give the system what is free now, whatever is kept later: for those who measure memory.

    Returns:
        As `keep_freed_memory`.
    """
    if not _is_glibc():
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _set(parameters: dict[int, int]) -> bool:
    if not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return {mallopt(number, value) for number, value in parameters.items()} == {1}
