"""Training: a thin Trainer that runs gradient strategies in the loop of transformers and accelerate."""
