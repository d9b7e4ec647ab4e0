"""What a server runs next and whom it lets in: decisions over plain values, without torch, tasks or a clock."""
