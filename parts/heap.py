"""The heap of a process on Linux: what glibc is told, so that freed memory is used again.

Every step frees large tensors and asks for others of the same sizes. torch wants memory that begins
at a multiple of 64 bytes. glibc takes some bytes more for that, gives the rest back, and keeps such
small chunks apart for the next small request. So behind each tensor stands a chunk in use: the
holes of freed tensors do not join, and none takes a tensor of its own size with the bytes more. A
step of GRPO took twice the memory that its tensors had.
"""

import ctypes
import os
import platform
import sys
from contextlib import suppress

# How many small chunks of each size glibc keeps apart for a thread.
KEPT_APART = "glibc.malloc.tcache_count"
# From so many bytes on, freed memory goes back to the system. glibc goes no higher by itself.
RETURNED_BYTES = 2**25


def restart_with_joined_holes() -> None:
    """Start the program anew, once, so that no small chunks are kept apart for its threads.

    glibc reads how many it keeps when a process starts, and never again. To be called before torch
    is loaded. Nothing happens where a program of another's runs this one.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_whole_process = sys.orig_argv[-len(sys.argv) :] == sys.argv and "torch" not in sys.modules
    if KEPT_APART in tunables or not is_whole_process or not _has_glibc():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{KEPT_APART}=0")))
    with suppress(OSError):  # it works all the same
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Tell malloc to keep freed memory for the next request, and to join it at once.

    By default each large tensor goes back to the system and costs a page fault per 4 KiB when it
    returns: LOG.md has what that costs. The largest ones, such as logits, still go back: a hole of
    theirs would be filled with smaller ones before the next is asked for.
    """
    if _has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, RETURNED_BYTES)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(1, 0)  # M_MXFAST: no small chunks are kept apart, for all threads


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
