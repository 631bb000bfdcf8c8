"""What the C library does with memory that is freed.

By default glibc gives large blocks back to the operating system at once, and who needs them next gets each
page anew, zeroed: activations, gradients and DeepSpeed's flat copies of a processor's step are such blocks,
and so are the encoded images of a loader's batch. On a GPU torch keeps freed memory by itself.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULT_MMAP_MAX = 65_536
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Keep freed memory for the next step or batch; the process then never shrinks."""
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER})


def return_freed_memory() -> None:
    """Give freed memory back at once, so that what the process holds is what its tensors have touched."""
    _set({_MMAP_MAX: _DEFAULT_MMAP_MAX, _MMAP_THRESHOLD: 1 << 16, _TRIM_THRESHOLD: 1 << 17})
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _set(parameters: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    # Other C libraries have no such switches, and need none.
    if hasattr(library, "mallopt"):
        for parameter, value in parameters.items():
            library.mallopt(parameter, value)
