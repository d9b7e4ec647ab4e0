"""Arithmetic over adapters: what several clients have learned, as one."""
