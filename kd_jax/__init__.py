"""Distils a large language model into a small one, with any divergence, assistant, schedule and source of text."""
