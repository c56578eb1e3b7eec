"""Generation, judges, tasks and statistics; knows models only through `nn.models` and nothing of training."""
