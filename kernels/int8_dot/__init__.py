"""The product of int8 activations with int8 weights under integer low-rank noise."""
