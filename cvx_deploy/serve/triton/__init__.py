"""A bundle in Triton Inference Server: what its Python backend is told (`config`), and what it runs (`model`)."""
