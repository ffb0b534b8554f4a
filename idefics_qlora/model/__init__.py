"""The 4-bit base, its adapters, their arithmetic and their memory."""
