"""Which lower part of a model to leave as it is, chosen before the first step."""
