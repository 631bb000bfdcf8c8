"""Process groups, tensor parallelism and the ZeRO engine; megatron-core and DeepSpeed live here only."""
