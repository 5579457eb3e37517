"""What happens to data: datasets, models, the loop, the record of a run."""
