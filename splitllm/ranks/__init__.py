"""Several processes of one server: rank 0 leads, the others compute a share of every batch."""
