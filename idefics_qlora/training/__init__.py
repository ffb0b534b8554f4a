"""The loop, and what goes on around it."""
