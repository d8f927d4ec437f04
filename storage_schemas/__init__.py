"""What is on disk: every path, column, axis, dtype and version stands in this package."""
