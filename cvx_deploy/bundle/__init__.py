"""The bundle: one folder that holds everything a run needs. Its manifest, opened and checked, packed and described."""
