"""What a machine was measured to do, and what it is expected to do: results first, then what shows them."""
