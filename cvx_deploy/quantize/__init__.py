"""Calibration tables in, graphs with explicit QuantizeLinear and DequantizeLinear nodes out."""
