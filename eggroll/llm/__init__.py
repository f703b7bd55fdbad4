"""Language models: checkpoints, tokenizers, chat templates, population decoding. Nothing in the engine imports this."""
