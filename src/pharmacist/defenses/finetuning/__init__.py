"""Fine-tuning-stage defenses: applied by the provider during a user's fine-tuning job."""
