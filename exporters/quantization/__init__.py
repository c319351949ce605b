"""What quantization takes from a checkpoint: ranges of activations, sensitivities, weights in fewer bits."""
