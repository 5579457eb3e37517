"""What a person types: predict, summary, export."""
