"""Bundles in, videos out: NumPy on the host, a network engine behind one seam, no PyTorch."""
