"""Dialogues on disk -> batches. Knows the tokenizer and the chat format, never the model."""
