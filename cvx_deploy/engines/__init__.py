"""What runs networks: one registry, one seam, a folder for each kind of engine."""
