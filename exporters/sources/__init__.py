"""Where checkpoints come from: folders, hubs, SAT files, adapters, random weights."""
