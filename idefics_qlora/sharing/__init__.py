"""What people give away: merged weights, an adapter or a model with its card; a page to try it."""
