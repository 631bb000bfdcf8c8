"""What ranks and tools share that launch.py forks: megatron-core, imported as a rank imports it."""

from megaregion.parallel.tensor_parallel import _megatron

_megatron()
