"""The command `bench`: a grid of selectors, defenses and attacks as a graph of stages, each of which runs once."""
