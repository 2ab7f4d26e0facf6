"""What of a text is read at a time, and which of its tokens count, when a model is scored."""
