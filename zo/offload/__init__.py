"""Models larger than the device: blocks in host memory, one on the device at a time (ZO2, DistZO2)."""
