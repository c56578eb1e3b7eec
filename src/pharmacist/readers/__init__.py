"""Classifiers of a prompt and its answer, by words and by a model's hidden states; for selectors and judges."""
