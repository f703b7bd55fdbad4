"""Language tasks from local JSONL files: tokens, padded examples, losses. Corpora of bytes."""
