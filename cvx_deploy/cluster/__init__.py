"""Many machines through Ray: joining its cluster, and bundles at hand on each of its nodes."""
