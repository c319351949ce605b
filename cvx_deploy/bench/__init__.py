"""A bundle measured against eager PyTorch, and what shows the results."""
