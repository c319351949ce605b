"""The networks of CogVideoX, one file each: the module that is traced, and its contract."""
