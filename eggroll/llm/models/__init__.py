"""Decoder architectures as plain functions of a parameter pytree."""
