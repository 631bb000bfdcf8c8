"""A GPU that is not there: kernels, bytes, FLOPs, host waits and memory of a step, on fake CUDA tensors."""
