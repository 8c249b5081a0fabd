"""Answers in text: found (forms), spelled alike (spelling), read as what they mean (values), compared (equality)."""
