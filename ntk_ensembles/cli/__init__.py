"""The commands: what they accept, what they print, and how they end (`main`)."""
