"""What holds a server's frozen base, or an optimiser's state, beyond the memory of one process: DeepSpeed and FSDP2."""
