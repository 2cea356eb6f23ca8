"""Loading a trained model and continuing texts."""
