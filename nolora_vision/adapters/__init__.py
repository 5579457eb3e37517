"""What happens to an adapter: saved, loaded, shared, swapped, exported, looked at."""
