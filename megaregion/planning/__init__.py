"""Planning: what a run will need and take before it starts, and what faults will take from it.

hardware   a cluster's processors, links and storage
layout     parameters, micro-batches, rows and classes of one rank
memory     bytes of one rank by kind, activations among them
timing     seconds of a step by phase
traffic    what crosses the links in a step
faults     goodput under random faults
plan       all of it together; a run's resolutions, other sizes of the cluster, the best way to spread it
dry_run    one rank really built, beside its plan
fake_gpu   a step of it on fake CUDA tensors: kernels, bytes, waits
report     tables and JSON
"""
