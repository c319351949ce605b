"""Engines in the place of the networks of a diffusers pipeline."""
