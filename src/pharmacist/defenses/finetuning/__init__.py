"""Fine-tuning-stage defenses: what a provider does during a user's fine-tuning job."""
