"""What runs the model: one file for each engine."""
