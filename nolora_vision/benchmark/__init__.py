"""What happens to many runs, and to many models."""
