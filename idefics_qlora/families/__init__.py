"""What differs between the kinds of model, and nothing else."""
