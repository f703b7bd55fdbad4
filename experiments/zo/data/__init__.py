"""Fine-tuning tasks as arrays."""
