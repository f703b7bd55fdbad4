"""Language tasks from local JSONL files: records, tokens, padded examples, losses. Corpora of bytes."""
