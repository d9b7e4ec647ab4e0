"""What one machine computes: shards, their LoRA adapters, the head and the loss."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it warns of what is not used here
