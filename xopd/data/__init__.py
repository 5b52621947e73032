"""Paired speech and text: a checkable instruction world, its speech, and corpora of both."""
