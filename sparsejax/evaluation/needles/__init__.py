"""Questions about facts hidden in long contexts: made, put to a model, and scored."""
