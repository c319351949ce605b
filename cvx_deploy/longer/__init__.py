"""Videos longer than a model makes: clips that go on from each other, colours held, frames between frames."""
