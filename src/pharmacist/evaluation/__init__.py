"""Generation, judges, graders, metrics and statistics; independent of training."""
