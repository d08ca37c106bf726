"""The only code that knows pipeline stages."""
