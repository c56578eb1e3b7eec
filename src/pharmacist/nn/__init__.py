"""Model access: loading, adapters, losses and forward-only passes; knows no Trainer."""
