"""Systems of language, and of language with pictures."""
