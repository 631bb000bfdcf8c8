"""Planning: what a run will need and take before it starts, and what faults will take from it.

hardware    a cluster's processors, links and storage
layout      parameters, micro-batches, rows and classes of one rank
memory      bytes of one rank by kind, activations among them
timing      seconds of a step by phase, and what crosses the links in it
curation    hours of curation's stages for a load
faults      goodput under random faults
plan        all of it together; a run's resolutions, other sizes of the cluster, the best way to spread it
dry_run     one rank built beside its plan, and a step of it on a GPU that is not there
kernels     counts kernels, bytes and waits
compiled    counts what torch.compile would start
fake_cuda   fake CUDA tensors, and what libraries ask of CUDA; cuda_guard answers autograd
report      tables and JSON
"""
