"""The Pharmacist selector: evidence from references, twins that learn from the pool, and what joins them."""
