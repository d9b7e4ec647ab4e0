"""What surrounds the training loop: the processes, the base model, interruption, and what a run leaves behind."""
