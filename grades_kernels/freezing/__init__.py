"""Which tensors freeze together, when they freeze, and by which rule: plain Python, no backend."""
