"""Who sits where: the client below, a server on every tier above it."""
