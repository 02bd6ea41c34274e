"""Command-line tools around pyinfer: measuring, comparing with other programs, and making test data."""
