"""Thousands of videos from a file of prompts, in this process or on the nodes of a Ray cluster."""
