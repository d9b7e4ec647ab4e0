"""What one machine computes: shards, their LoRA adapters, the head and the loss."""
