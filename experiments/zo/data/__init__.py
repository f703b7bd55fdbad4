"""Fine-tuning tasks as arrays, and the losses on them."""
