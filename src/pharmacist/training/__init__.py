"""Training: one thin Trainer that runs gradient strategies; transformers and accelerate own the loop."""
