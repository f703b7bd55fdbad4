"""Byte-level recurrent models, integer and floating."""
