"""What is true of one model family only; the rest of the program asks a family and never a model's name."""
