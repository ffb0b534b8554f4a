"""What people give away: merged weights, and an adapter or a model on the Hub with its card."""
