"""Everything that computes: each backend takes the steps of an optimizer's tensors."""
