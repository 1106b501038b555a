"""The tokenizer of a run, and the store of all distinct texts as token ids."""
