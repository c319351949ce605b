"""Prompts (and an image, or a video) to frames: tokenizer, noise, schedulers, sampler, VAE chunks."""
