"""CogVideoX: its published models, what tells them apart, how its VAE is cut, which of its layers are quantized."""
