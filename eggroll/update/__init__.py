"""From fitness to new parameters: shaping, gradient estimate, optimizer step, rounding."""
