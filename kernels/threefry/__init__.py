"""The counter-based random bits that every noise address uses."""
