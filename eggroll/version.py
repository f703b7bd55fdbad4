"""The version of this package, which records of runs name."""

VERSION = "0.3.0"
