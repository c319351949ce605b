"""OpenVINO, on CPUs."""
