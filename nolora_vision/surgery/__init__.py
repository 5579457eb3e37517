"""What happens to a model: adapters, sites, injection."""
