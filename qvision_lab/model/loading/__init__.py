"""Checkpoints on disk and on the Hub: both layouts, revisions, and what is refused."""
