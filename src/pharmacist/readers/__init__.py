"""What can be read of a prompt and its answer, in words and in a model's hidden states; for selectors and judges."""
