"""What travels between tiers: messages and the links that carry them."""
