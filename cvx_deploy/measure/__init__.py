"""What is measured and how it is told: this machine, memory, errors and their limits, units."""
