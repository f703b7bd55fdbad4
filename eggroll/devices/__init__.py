"""Devices and processes: meshes, sharded evaluation and gradient, chunks that fit the memory."""
