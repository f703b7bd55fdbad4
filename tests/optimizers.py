"""One object for equal arguments: strategies that are made again with it are equal, and share plans and compiled programs."""

import functools

import optax

adam, sgd = functools.cache(optax.adam), functools.cache(optax.sgd)
